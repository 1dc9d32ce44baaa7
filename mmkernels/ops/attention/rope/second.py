"""Second derivatives and forward mode of the prologue: PyTorch, in O(T·H·D) memory.

With h, r, u as in reference.py, c' = x' [- mean x'], and tangents written with a prime (the rotation is linear)::

    h' = r (c' - h mean(h c'))      n' = h' w + h w' + b'      r' = -r^2 mean(h c')      u' = g w'

    dx' = r (u' - [mean u'] - h mean(u' h)) + r' (u - [mean u] - h mean(u h)) - r (h' mean(u h) + h mean(u h'))
    dw' = sum_rows g h'             db' = 0
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.attention.rope.reference import normalised, rotate, wide

__all__ = ["norm_rope_second"]


def _mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


def norm_rope_second(
    tangent_x: Tensor | None,
    tangent_weight: Tensor | None,
    tangent_bias: Tensor | None,
    grad_out: Tensor | None,
    x: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    weight: Tensor | None,
    norm: str,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, ...]:
    """Tangents of y [T, H, D]; of dx, dweight and dbias, empty if grad_out is None (or without a norm)."""
    like = next(t for t in (x, grad_out, tangent_x) if t is not None)
    moved_x = wide(torch.zeros_like(like) if tangent_x is None else tangent_x)
    turn = cos, sin, interleaved
    empty = moved_x.new_empty(0)
    if x is None:
        moved_dx = like.new_empty(0) if grad_out is None else torch.zeros_like(grad_out)
        return rotate(moved_x, *turn, 1.0).to(like.dtype).contiguous(), moved_dx, empty, empty
    center = _mean if norm == "layer" else torch.zeros_like
    h, r = normalised(wide(x), norm, eps)
    moved_x = moved_x - center(moved_x)
    along = _mean(h * moved_x)
    moved_h = r * (moved_x - h * along)
    moved_n = moved_h if weight is None else moved_h * weight
    moved_n = moved_n if tangent_weight is None else moved_n + h * tangent_weight
    moved_n = moved_n if tangent_bias is None else moved_n + tangent_bias
    moved_y = rotate(moved_n, *turn, 1.0).to(x.dtype).contiguous()
    if grad_out is None:
        return moved_y, x.new_empty(0), empty, empty
    g = rotate(wide(grad_out), *turn, -1.0)
    u = g if weight is None else g * weight
    moved_u = torch.zeros_like(g) if tangent_weight is None else g * tangent_weight
    moved_dx = r * (
        moved_u - center(moved_u) - h * _mean(moved_u * h) - moved_h * _mean(u * h) - h * _mean(u * moved_h)
    )
    moved_dx = moved_dx - r.square() * along * (u - center(u) - h * _mean(u * h))
    moved_bias = torch.zeros_like(h[0, 0]) if norm == "layer" else empty
    return moved_y, moved_dx.to(x.dtype).contiguous(), (g * moved_h).sum((0, 1)), moved_bias
