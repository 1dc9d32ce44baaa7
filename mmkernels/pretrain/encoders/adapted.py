"""Adapters: small layers inside an encoder that learn while the rest stays as it is.

Source: Houlsby et al. 2019 (arXiv:1902.00751).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmkernels.pretrain.batch import Piece
from mmkernels.pretrain.encoders.base import EncoderModule
from mmkernels.pretrain.layers import add_adapters
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
        module: EncoderModule = self.encoder.build(facts)
        if not add_adapters(module, facts.shape.width, self.reduction):
            raise ValueError(f"Adapted: encoder: expected one with transformer blocks, got {self.encoder}")
        return module
