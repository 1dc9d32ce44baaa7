"""Second derivatives and forward mode of the gated residual: PyTorch, in O(N·C) memory.

With t = tanh(gate), e = 1 - t^2, g the gradient of out, and tangents written with a prime::

    (out - residual)' = t x' + e gate' x      dx' = e gate' g      dgate' = e sum g (x' - 2 t gate' x)
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.attention.gate.reference import spread

__all__ = ["gated_residual_second"]


def gated_residual_second(
    tangent_x: Tensor | None,
    tangent_gate: Tensor | None,
    grad_out: Tensor | None,
    x: Tensor,
    gate: Tensor,
    by_column: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tangents of out [N, C] without the residual's; of dx [N, C] and dgate, empty if grad_out is None."""
    wide = x.to(gate.dtype)
    moved_x = torch.zeros_like(wide) if tangent_x is None else tangent_x.to(gate.dtype)
    moved_gate = torch.zeros_like(gate) if tangent_gate is None else tangent_gate.to(gate.dtype)
    t, e = gate.tanh(), 1 - gate.tanh().square()
    moved = spread(t, x, by_column) * moved_x + spread(e * moved_gate, x, by_column) * wide
    if grad_out is None:
        return moved.to(x.dtype), x.new_empty(0), gate.new_empty(0)
    g = grad_out.to(gate.dtype)
    moved_dx = spread(e * moved_gate, x, by_column) * g
    product = g * (spread(e, x, by_column) * moved_x - spread(2 * t * e * moved_gate, x, by_column) * wide)
    sums = product.sum(0) if by_column else product.sum(1).view(-1, gate.shape[0]).sum(0)
    return moved.to(x.dtype), moved_dx.to(x.dtype), sums
