"""The oracle: plain PyTorch over the dense score matrix, float64-capable.

    s_ij  = scale <q_i, k_j>  for lo_i <= j < hi_i, else -inf          lse_i = log sum_j exp(s_ij)
    p_ij  = exp(s_ij - lse_i)                                          out_i = sum_j p_ij v_j

and with do = dL/dout, dlse = dL/dlse, delta_i = <do_i, out_i> - dlse_i:

    ds_ij = p_ij (<do_i, v_j> - delta_i)
    dq_i  = scale sum_j ds_ij k_j     dk_j = scale sum_i ds_ij q_i     dv_j = sum_i p_ij do_i

A row that sees no key has lse = -inf and p = 0. Low-precision inputs are computed in float32.
"""

from __future__ import annotations

import torch

__all__ = ["attention_bwd", "attention_fwd", "visible"]


def visible(lo: torch.Tensor, hi: torch.Tensor, num_keys: int) -> torch.Tensor:
    """Dense mask of row intervals: bool [Tq, Tk]."""
    key = torch.arange(num_keys, device=lo.device)
    return (lo[:, None] <= key) & (key < hi[:, None])


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _probabilities(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, scale: float) -> tuple[torch.Tensor, ...]:
    """p [H, Tq, Tk] and lse [H, Tq] from q [Tq, H, D], k [Tk, H, D] and mask [Tq, Tk]."""
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    scores = scores.masked_fill(~mask, -torch.inf)
    return torch.where(mask, scores.softmax(-1), 0.0), torch.logsumexp(scores, dim=-1)


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
    """out [Tq, H, Dv] in q's dtype and lse [H, Tq]; first_q and last_q only bound loops, and there are none here."""
    dtype, group = _compute_dtype(q), q.shape[1] // k.shape[1]
    mask = visible(lo, hi, k.shape[0])
    p, lse = _probabilities(q.to(dtype), k.to(dtype).repeat_interleave(group, dim=1), mask, scale)
    out = torch.einsum("hqk,khd->qhd", p, v.to(dtype).repeat_interleave(group, dim=1))
    return out.to(q.dtype).contiguous(), lse


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
    """dq, dk and dv in the dtypes of q, k and v; probabilities are computed again, `out` and `lse` are not needed."""
    dtype, group = _compute_dtype(q), q.shape[1] // k.shape[1]
    x, do = q.to(dtype), grad_out.to(dtype)
    y, w = (t.to(dtype).repeat_interleave(group, dim=1) for t in (k, v))
    p, _ = _probabilities(x, y, visible(lo, hi, k.shape[0]), scale)
    dp = torch.einsum("qhd,khd->hqk", do, w)
    dp = dp - (p * dp).sum(-1, keepdim=True)  # <do_i, out_i> without out's rounding
    if grad_lse is not None:
        dp = dp + grad_lse.to(dtype)[..., None]
    ds = p * dp * scale
    dq = torch.einsum("hqk,khd->qhd", ds, y)
    dk = torch.einsum("hqk,qhd->khd", ds, x).unflatten(1, (k.shape[1], group)).sum(2)
    dv = torch.einsum("hqk,qhd->khd", p, do).unflatten(1, (k.shape[1], group)).sum(2)
    return dq.to(q.dtype).contiguous(), dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous()
