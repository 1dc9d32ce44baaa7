"""Calls into the native core: allocates outputs and launches the CPU kernels; there is no CUDA C++ kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmkernels.ops.dtypes import compute_dtype
from mmkernels.runtime import native
from mmkernels.runtime.native import threads, unit_stride, view

__all__ = ["norm_rope_bwd", "norm_rope_fwd"]


def _kind(norm: str) -> Any:
    """The core's `Norm` for "rms", "layer" or ""."""
    return native.core.Norm.__members__[norm or "none"]


def norm_rope_fwd(
    x: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
    interleaved: bool,
) -> Tensor:
    """y [T, H, D]."""
    x, y = unit_stride(x), x.new_empty(x.shape)
    views = view(x), view(cos), view(sin), view(weight), view(bias), view(y)
    native.core.launch_attention_norm_rope_fwd_cpu(*views, _kind(norm), eps, interleaved, threads())
    return y


def norm_rope_bwd(
    grad_out: Tensor,
    x: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    weight: Tensor | None,
    norm: str,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [T, H, D]; dweight [D], empty without a norm, dbias [D], empty unless "layer"."""
    grad_out, x = unit_stride(grad_out), unit_stride(x) if x is not None else None
    dx = grad_out.new_empty(grad_out.shape)
    dtype = compute_dtype(grad_out.dtype)
    D = grad_out.shape[2]
    dweight = grad_out.new_empty(D if norm else 0, dtype=dtype)
    dbias = dweight.new_empty(D if norm == "layer" else 0)
    inputs = view(grad_out), view(x), view(cos), view(sin), view(weight)
    outputs = view(dx), view(dweight), view(dbias)
    native.core.launch_attention_norm_rope_bwd_cpu(*inputs, *outputs, _kind(norm), eps, interleaved, threads())
    return dx, dweight, dbias
