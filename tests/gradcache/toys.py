"""Small encoders and losses for the gradient caching tests, and how they compare gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Encoder(nn.Module):
    """A small tower; counts its calls."""

    def __init__(self, width: int = 12, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, 8))
        self.calls: list[int] = []

    def forward(self, x: Tensor, gain: float = 1.0, mask: Tensor | None = None) -> Tensor:
        self.calls.append(len(x))
        x = x if mask is None else x * mask
        return F.normalize(gain * self.layers(x), dim=-1)


def gradients(*modules: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for module in modules for p in module.parameters() if p.grad is not None]


def clear(*modules: nn.Module) -> None:
    for module in modules:
        module.zero_grad(set_to_none=True)


def assert_same(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-6) -> None:
    """The relative error of each gradient."""
    assert len(actual) == len(expected) > 0
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == b.dtype
        distance = (a - b).norm() / b.norm()
        assert distance <= tolerance, f"gradient {i}: relative distance {distance:.2e}"


def chunk_graph(encoders: list[nn.Module], inputs: list[Tensor], sizes: list[int]) -> list[Tensor]:
    """All chunks in the order of pass 1, in one graph."""
    return [
        torch.cat([encoder(chunk) for chunk in value.split(size)])
        for encoder, value, size in zip(encoders, inputs, sizes, strict=True)
    ]
