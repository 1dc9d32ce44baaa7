"""FLOP of attention, over the pairs that a mask lets see: 2 for each multiply-add of the products."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmkernels.ops.attention.reference import MaskRows, visible
from mmkernels.ops.checks import is_traced

__all__ = ["bwd_flops", "fwd_flops", "second_flops", "visible_pairs"]

_ROWS_A_CHUNK = 1024  # of the dense mask of a pattern


def visible_pairs(rows: MaskRows) -> int:
    """How many pairs are visible; where there are no values to read (fake tensors), all. Syncs with a CUDA device."""
    tokens_q, tokens_k = rows.lo.shape[0], rows.first_q.shape[0]
    if is_traced(rows.lo) or rows.lo.is_meta:
        return tokens_q * tokens_k
    if rows.span_q is None:
        return int((rows.hi.long() - rows.lo.long()).clamp(min=0).sum())
    along_q = [rows.lo, rows.hi, rows.span_q, rows.allow_q]
    chunks = zip(*(x.split(_ROWS_A_CHUNK) for x in along_q if x is not None), strict=True)
    return sum(
        int(visible(rows.changed(lo=lo, hi=hi, span_q=span, allow_q=allow), tokens_k).sum())
        for lo, hi, span, allow in chunks
    )


def _multiply_adds(q: Tensor, v: Tensor, mask: tuple[Any, ...], of_d: int, of_dv: int) -> int:
    """So many products over D, and over Dv."""
    return 2 * visible_pairs(MaskRows(*mask)) * q.shape[1] * (of_d * q.shape[2] + of_dv * v.shape[2])


def fwd_flops(q: Tensor, v: Tensor, mask: tuple[Any, ...]) -> int:
    """Scores and out. An additive score is a product over D too, of w and the tanh."""
    return _multiply_adds(q, v, mask, 1, 1)


def bwd_flops(q: Tensor, v: Tensor, mask: tuple[Any, ...]) -> int:
    """Scores again, dp, dv, dq and dk: as PyTorch counts F.scaled_dot_product_attention."""
    return _multiply_adds(q, v, mask, 3, 2)


def second_flops(grad_out: Tensor | None, q: Tensor, v: Tensor, mask: tuple[Any, ...]) -> int:
    """Scores and their tangent, the tangent of out; of a gradient dp, and the tangents of dp, dq, dk and dv."""
    return _multiply_adds(q, v, mask, 3, 3) if grad_out is None else _multiply_adds(q, v, mask, 7, 6)
