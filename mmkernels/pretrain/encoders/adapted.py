"""Adapters: small layers inside an encoder that learn while the rest stays as it is.

Source: Houlsby et al. 2019 (arXiv:1902.00751).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.pretrain.batch import Piece
from mmkernels.pretrain.encoders.base import EncoderModule
from mmkernels.pretrain.layers import Block, start_as_identity
from mmkernels.pretrain.recipe import Facts
from mmkernels.pretrain.tokenizer import TextTokenizer

__all__ = ["Adapted"]


@dataclass(frozen=True)
class Adapted:
    """An encoder with an adapter after the attention and after the feed-forward of each of its blocks. The encoder's
    own parameters keep their names, so that its weights load from a run without adapters; those of the adapters match
    the pattern `*.adapter.*`."""

    encoder: Any
    """Any encoder with transformer blocks."""
    reduction: int = 8
    """Channels of a token divided by those of an adapter's hidden layer."""

    def __post_init__(self) -> None:
        if self.reduction < 1:
            raise ValueError(f"reduction: expected at least 1, got {self.reduction}")

    @property
    def reads_text(self) -> bool:
        return bool(self.encoder.reads_text)

    def __getattr__(self, name: str) -> Any:
        """What views and objectives ask of the encoder, such as its `size`."""
        if name.startswith("__") or name == "encoder":  # while this is being copied
            raise AttributeError(name)
        return getattr(self.encoder, name)

    def prepare(self, values: Sequence[Any], tokenizer: TextTokenizer) -> list[Piece]:
        return list(self.encoder.prepare(values, tokenizer))

    def length(self, value: Any, tokenizer: TextTokenizer) -> int:
        return int(self.encoder.length(value, tokenizer))

    def build(self, facts: Facts) -> EncoderModule:
        width = facts.shape.width
        if self.reduction > width:
            raise ValueError(f"Adapted: reduction: expected at most the width {width}, got {self.reduction}")
        module: EncoderModule = self.encoder.build(facts)
        blocks = [block for block in module.modules() if isinstance(block, Block)]
        if not blocks:
            raise ValueError(f"Adapted: encoder: expected one with transformer blocks, got {self.encoder}")
        for layer in (layer for block in blocks for layer in (block.attention, block.feed_forward)):
            layer.adapter = Adapter(width, width // self.reduction)
            layer.register_forward_hook(adapt)
        return module


class Adapter(nn.Module):
    """x + up(gelu(down(x))), at first the identity.

    Args:
        width: C.
        hidden: channels in between.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, hidden), nn.Linear(hidden, width)
        start_as_identity(self.up)

    def forward(self, x: Tensor) -> Tensor:
        """[T, C] -> [T, C]"""
        return x + self.up(F.gelu(self.down(x), approximate="tanh"))


def adapt(layer: Any, inputs: Any, output: Tensor) -> Tensor:
    """The forward hook of an adapted layer."""
    adapted: Tensor = layer.adapter(output)
    return adapted
