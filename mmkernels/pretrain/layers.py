"""The transformer block that encoders, fusions and decoders share."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmkernels import AttentionMask
from mmkernels.nn import CrossModalAttention, FusedSelfAttention, GatedCrossAttention, Rotary
from mmkernels.pretrain.recipe import Facts

__all__ = ["Adapter", "Block", "Blocks", "FeedForward", "add_adapters", "convolutions", "start_as_identity"]


def start_as_identity(*layers: nn.Linear) -> None:
    """Zero the last layers of residual branches, so that a block starts as the identity."""
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


class FeedForward(nn.Module):
    """norm -> 4 C channels -> C, without the residual."""

    def __init__(self, facts: Facts) -> None:
        super().__init__()
        width = facts.shape.width
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(facts.shape.dropout)
        start_as_identity(self.down)

    def forward(self, x: Tensor) -> Tensor:
        """[T, C] -> [T, C]"""
        return self.dropout(self.down(F.gelu(self.up(self.norm(x)), approximate="tanh")))


class Block(nn.Module):
    """A pre-norm transformer block over packed tokens.

    Args:
        facts: the sizes.
        rotary: rotate queries and keys, which are then normalised (RMS) too.
    """

    def __init__(self, facts: Facts, rotary: bool = False) -> None:
        super().__init__()
        shape = facts.shape
        options: dict[str, Any] = {"rotary": Rotary(), "qk_norm": "rms"} if rotary else {}
        self.norm = nn.LayerNorm(shape.width)
        self.attention = FusedSelfAttention(shape.width, shape.heads, backend=facts.backend, **options)
        self.dropout = nn.Dropout(shape.dropout)
        self.feed_forward = FeedForward(facts)
        if not rotary:  # without norms, queries and keys as small as a Linear's learn faster
            self.attention.qkv_proj.reset_parameters()
        start_as_identity(self.attention.out_proj)

    def forward(self, x: Tensor, mask: AttentionMask, positions: Any = None) -> Tensor:
        """x [T, C] -> [T, C]; the mask determines which tokens see each other."""
        x = x + self.dropout(self.attention(self.norm(x), mask, positions=positions))
        return x + self.feed_forward(x)


class Blocks(nn.ModuleList):
    """A stack of blocks.

    Args:
        layers: their number.
        facts: the sizes, and whether activations are computed again in the backward instead of kept.
        rotary: as for `Block`.
    """

    def __init__(self, layers: int, facts: Facts, rotary: bool = False) -> None:
        super().__init__(Block(facts, rotary) for _ in range(layers))
        self.recompute = facts.recompute

    def forward(
        self, x: Tensor, mask: AttentionMask, positions: Tensor | None = None, depth: int | None = None
    ) -> Tensor:
        """x [T, C] -> [T, C]; with rotary blocks, positions [T]. The first `depth` blocks; None: all."""
        table: Any = None
        if positions is not None and len(self):  # one table for all blocks
            attention: Any = self[0].attention
            wide = torch.promote_types(x.dtype, torch.float32)
            table = attention.rotary.cos_sin(positions, attention.head_dim, wide)
        for block in list(self)[:depth]:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, mask, table, use_reentrant=False)
            else:
                x = block(x, mask, table)
        return x


class Adapter(nn.Module):
    """x + up(gelu(down(x))), at first the identity.

    Args:
        width: C.
        hidden: channels in between.

    Source: Houlsby et al. 2019 (arXiv:1902.00751).
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, hidden), nn.Linear(hidden, width)
        start_as_identity(self.up)

    def forward(self, x: Tensor) -> Tensor:
        """[T, C] -> [T, C]"""
        return x + self.up(F.gelu(self.down(x), approximate="tanh"))


def add_adapters(module: nn.Module, width: int, reduction: int) -> int:
    """Give each attention and each feed-forward in a module an adapter of its output, before that is added to what came
    in; returns their number. (A gated attention adds by itself, so it has none.)

    Args:
        module: changed in place; its own parameters keep their names.
        width: C.
        reduction: C divided by an adapter's hidden channels.
    """
    if reduction > width:
        raise ValueError(f"Adapted: reduction: expected at most the width {width}, got {reduction}")
    kinds = (FusedSelfAttention, CrossModalAttention, FeedForward)
    found: list[Any] = [m for m in module.modules() if isinstance(m, kinds) and not isinstance(m, GatedCrossAttention)]
    for layer in found:
        layer.adapter = Adapter(width, width // reduction)
        layer.register_forward_hook(_adapted)
    return len(found)


def _adapted(layer: Any, inputs: Any, output: Tensor) -> Tensor:
    """The forward hook of an adapted layer."""
    adapted: Tensor = layer.adapter(output)
    return adapted


def convolutions(width: int) -> nn.Sequential:
    """[B, 3, 8 h, 8 w] -> [B, C, h, w]"""
    layers: dict[str, nn.Module] = {}
    channels = 3
    for i, halved in enumerate((width // 4, width // 2)):
        layers[f"convolution_{i}"] = nn.Conv2d(channels, halved, 3, stride=2, padding=1, bias=False)
        layers[f"norm_{i}"] = nn.GroupNorm(math.gcd(8, halved), halved)
        layers[f"gelu_{i}"] = nn.GELU(approximate="tanh")
        channels = halved
    layers["convolution_2"] = nn.Conv2d(channels, width, 3, stride=2, padding=1)
    return nn.Sequential(OrderedDict(layers))
