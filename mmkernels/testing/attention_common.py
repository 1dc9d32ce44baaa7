"""Attention inputs with similar tokens, so that gradients are small differences of large terms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from mmkernels.testing.attention import AttentionInputs
from mmkernels.testing.attention_additive import AdditiveInputs

__all__ = ["FAMILIES", "share"]

Inputs = TypeVar("Inputs", AttentionInputs, AdditiveInputs)


def _mean(x: Tensor, generator: torch.Generator) -> Tensor:
    """A common mean three times as large as the tokens' deviations, as from a projection bias."""
    return x + 3 * torch.randn(1, *x.shape[1:], generator=generator, dtype=x.dtype)


def _near(x: Tensor, generator: torch.Generator) -> Tensor:
    """Tokens that differ by a thousandth, like patches of a uniform background."""
    return x[:1] + 1e-3 * x


def _one(x: Tensor, generator: torch.Generator) -> Tensor:
    """The same token repeated."""
    return x[:1].expand_as(x)


FAMILIES: dict[str, tuple[str, Callable[[Tensor, torch.Generator], Tensor]]] = {
    "mean of keys": ("k", _mean),
    "mean of values": ("v", _mean),
    "mean of both": ("kv", _mean),
    "mean of all": ("qkvg", _mean),
    "near keys and values": ("kv", _near),
    "one key and value": ("kv", _one),
    "one token": ("qkv", _one),
}


def share(x: Inputs, family: str, seed: int = 0) -> Inputs:
    """`x` with a transform of FAMILIES applied to its q, k, v or g (the gradient of out), rounded to their dtype."""
    names, change = FAMILIES[family]
    generator = torch.Generator().manual_seed(1000 + seed)
    changed = {}
    for name in ("grad_out" if letter == "g" else letter for letter in names):
        tensor: Tensor = getattr(x, name)
        changed[name] = change(tensor.double(), generator).to(tensor.dtype).contiguous()
    return replace(x, **changed)  # type: ignore[arg-type]
