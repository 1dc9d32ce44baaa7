"""Reference semantics of additive attention: PyTorch over [H, Tq, Tk, D], float64-capable.

    t_ijd = tanh(q_id + k_jd + b_d)      s_ij = sum_d w_d t_ijd  where i sees j, else -inf
    lse_i = log sum_j exp(s_ij)          p_ij = exp(s_ij - lse_i)          out_i = sum_j p_ij v_j

and with do, dlse the gradients of out and lse, delta_i = <do_i, out_i> - dlse_i:

    ds_ij = p_ij (<do_i, v_j> - delta_i)       g_ijd = ds_ij w_d (1 - t_ijd^2)       dv_j = sum_i p_ij do_i
    dq_i = sum_j g_ij      dk_j = sum_i g_ij      db = sum_ij g_ij      dw_d = sum_ij ds_ij t_ijd

A row that sees no key gives out 0, lse -inf and adds nothing to any gradient. Low-precision inputs use float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.attention.types import Visible

__all__ = ["additive_bwd", "additive_fwd", "heads_first", "probabilities"]


def heads_first(x: Tensor, dtype: torch.dtype, heads: int) -> Tensor:
    """[T, heads or fewer, D] -> [H, T, D]."""
    return x.to(dtype).repeat_interleave(heads // x.shape[1], dim=1).transpose(0, 1)


def probabilities(q: Tensor, k: Tensor, w: Tensor, bias: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """t [H, Tq, Tk, D], p [H, Tq, Tk], lse [H, Tq]."""
    x, y = (heads_first(t, w.dtype, q.shape[1]) for t in (q, k))
    t = torch.tanh((x + bias[:, None])[:, :, None] + y[:, None])
    scores = (t * w[:, None, None]).sum(-1).masked_fill(~seen, -torch.inf)  # sum is pairwise, a matmul is not
    return t, torch.where(seen, scores.softmax(-1), 0.0), torch.logsumexp(scores, -1)


def additive_fwd(q: Tensor, k: Tensor, v: Tensor, w: Tensor, bias: Tensor, mask: Visible) -> tuple[Tensor, Tensor]:
    """out [Tq, H, Dv] in q's dtype, lse [H, Tq] in w's."""
    _, p, lse = probabilities(q, k, w, bias, mask.dense(k.shape[0]))
    out = p @ heads_first(v, w.dtype, q.shape[1])
    return out.transpose(0, 1).to(q.dtype).contiguous(), lse


def additive_bwd(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    bias: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Visible,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq in w's dtype, dk and dv in k's and v's, dw. Recomputes the probabilities; `out` and `lse` are not read."""
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    t, p, _ = probabilities(q, k, w, bias, mask.dense(k.shape[0]))
    do = heads_first(grad_out, w.dtype, heads)
    dp = do @ heads_first(v, w.dtype, heads).mT
    dp = dp - (p * dp).sum(-1, keepdim=True)  # <do_i, out_i> without the rounding of out
    ds = p * (dp if grad_lse is None else dp + grad_lse.to(w.dtype)[..., None])
    g = ds[..., None] * (1 - t) * (1 + t) * w[:, None, None]
    dk, dv = (x.unflatten(0, (k.shape[1], group)).sum(1).transpose(0, 1) for x in (g.sum(1), p.mT @ do))
    dq, dw = g.sum(2).transpose(0, 1).contiguous(), (ds[..., None] * t).sum((1, 2))
    return dq, dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous(), dw
