"""Calls of the native core: allocates the outputs and picks the CPU or the CUDA launcher."""

from __future__ import annotations

import torch

from mmkernels.runtime import native

__all__ = ["attention_bwd", "attention_fwd"]


def _rows(x: torch.Tensor) -> torch.Tensor:
    """The kernels want the last dimension contiguous; the others may have any stride."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _launch(what: str, q: torch.Tensor, *args: torch.Tensor | float | None) -> None:
    views = [native.view(a) if a is None or isinstance(a, torch.Tensor) else a for a in args]
    if q.device.type == "cpu":
        getattr(native.core(), f"launch_attention_{what}_cpu")(*views, native.threads())
        return
    with torch.cuda.device(q.device):
        getattr(native.core(), f"launch_attention_{what}_cuda")(*views, native.stream(q))


def attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lo: torch.Tensor,
    hi: torch.Tensor,
    first_q: torch.Tensor,
    last_q: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [Tq, H, Dv] and lse [H, Tq]."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty((q.shape[0], q.shape[1], v.shape[2]), dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=lse_dtype, device=q.device)
    _launch("fwd", q, q, k, v, lo, hi, first_q, last_q, scale, out, lse)
    return out, lse


def attention_bwd(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    lo: torch.Tensor,
    hi: torch.Tensor,
    first_q: torch.Tensor,
    last_q: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv, contiguous."""
    grad_out, q, k, v, out = _rows(grad_out), _rows(q), _rows(k), _rows(v), _rows(out)
    grad_lse = grad_lse.contiguous() if grad_lse is not None else None
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    _launch(
        "bwd", q, grad_out, grad_lse, q, k, v, out, lse, lo, hi, first_q, last_q, scale, dq, dk, dv, delta
    )  # fmt: skip
    return dq, dk, dv
