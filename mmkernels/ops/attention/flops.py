"""FLOP of attention over visible pairs: 2 per multiply-add of the products."""

from __future__ import annotations

from torch import Tensor

from mmkernels.ops.attention.types import Visible
from mmkernels.ops.checks import is_traced

__all__ = ["bwd_flops", "fwd_flops", "second_flops", "visible_pairs"]

_ROWS_A_CHUNK = 1024  # of the dense mask of a pattern


def visible_pairs(mask: Visible) -> int:
    """The number of visible pairs; all pairs for fake tensors, which have no values. Syncs on CUDA."""
    tokens_q, tokens_k = mask.lo.shape[0], mask.first_q.shape[0]
    if is_traced(mask.lo) or mask.lo.is_meta:
        return tokens_q * tokens_k
    if mask.span_q is None or mask.allow_q is None:
        return int((mask.hi.long() - mask.lo.long()).clamp(min=0).sum())
    along_q = (x.split(_ROWS_A_CHUNK) for x in (mask.lo, mask.hi, mask.span_q, mask.allow_q))
    return sum(
        int(Visible(lo, hi, mask.first_q, mask.last_q, span, mask.span_k, allow, mask.bit_k).dense(tokens_k).sum())
        for lo, hi, span, allow in zip(*along_q, strict=True)
    )


def _multiply_adds(q: Tensor, v: Tensor, mask: Visible, of_d: int, of_dv: int) -> int:
    """`of_d` products over D and `of_dv` over Dv."""
    return 2 * visible_pairs(mask) * q.shape[1] * (of_d * q.shape[2] + of_dv * v.shape[2])


def fwd_flops(q: Tensor, v: Tensor, mask: Visible) -> int:
    """Scores and out. An additive score counts as a product over D too, of w and the tanh."""
    return _multiply_adds(q, v, mask, 1, 1)


def bwd_flops(q: Tensor, v: Tensor, mask: Visible) -> int:
    """Scores again, dp, dv, dq and dk, as PyTorch counts F.scaled_dot_product_attention."""
    return _multiply_adds(q, v, mask, 3, 2)


def second_flops(grad_out: Tensor | None, q: Tensor, v: Tensor, mask: Visible) -> int:
    """Scores, their tangent and out's; with a gradient also dp and the tangents of dp, dq, dk and dv."""
    return _multiply_adds(q, v, mask, 3, 3) if grad_out is None else _multiply_adds(q, v, mask, 7, 6)
