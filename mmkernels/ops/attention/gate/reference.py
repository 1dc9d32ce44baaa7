"""Reference semantics of the gated residual: PyTorch, float64-capable.

    out = residual + tanh(gate) x      dx = tanh(gate) g      dgate = (1 - tanh(gate)^2) sum g x

with g the gradient of out. Low-precision inputs use float32.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["gated_residual_bwd", "gated_residual_fwd", "spread"]


def spread(gate: Tensor, x: Tensor, by_column: bool) -> Tensor:
    """The gates as [1, C] or [N, 1]: row n reads gate[n % G]."""
    return gate if by_column else gate.repeat(x.shape[0] // max(gate.shape[0], 1))[:, None]


def gated_residual_fwd(residual: Tensor, x: Tensor, gate: Tensor, by_column: bool) -> Tensor:
    """out [N, C] in residual's dtype."""
    out = residual.to(gate.dtype) + spread(gate.tanh(), x, by_column) * x.to(gate.dtype)
    return out.to(residual.dtype).contiguous()


def gated_residual_bwd(grad_out: Tensor, x: Tensor, gate: Tensor, by_column: bool) -> tuple[Tensor, Tensor]:
    """dx [N, C] in x's dtype, dgate [G] in gate's."""
    t, g = gate.tanh(), grad_out.to(gate.dtype)
    dx = (spread(t, x, by_column) * g).to(x.dtype).contiguous()
    product = g * x.to(gate.dtype)
    sums = product.sum(0) if by_column else product.sum(1).view(-1, gate.shape[0]).sum(0)
    return dx, sums * (1 - t) * (1 + t)
