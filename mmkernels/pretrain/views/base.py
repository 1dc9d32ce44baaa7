"""A view is a random change of a stream's values (images, texts), or of the tokens made of them."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from mmkernels.pretrain.data.seeds import Draws
from mmkernels.pretrain.recipe import Stream
from mmkernels.pretrain.tokenizer import TextTokenizer

__all__ = ["View"]


@dataclass(frozen=True)
class View:
    """Base of the views, frozen dataclasses in a recipe."""

    of_tokens: ClassVar[bool] = False  # changes prepared `Piece`s, rather than values
    evaluated: ClassVar[bool] = False  # also applied where a held-out loss is measured
    swaps: ClassVar[bool] = False  # takes values of other samples: of `Candidates`, a fourth argument, if given

    salt: int = field(default=0, kw_only=True)
    """Views of the same kind and field with another salt are drawn independently."""
    when: tuple[str, ...] = field(default=(), kw_only=True)
    """Applied at the steps at which one of these objectives is in use; empty: always."""

    def __call__(self, values: Sequence[Any], draws: Draws, labels: MutableMapping[str, np.ndarray]) -> list[Any]:
        """The changed values (or pieces) of a batch; absent ones stay as they are.

        Args:
            values: B values of the field, None where a sample lacks it; or B pieces.
            draws: of these samples.
            labels: label field -> int64 [B], among them "concept", the samples' concepts; a view may add its own.
        """
        raise NotImplementedError

    def check(self, name: str, streams: Mapping[str, Stream]) -> None:
        """Raise ValueError if it does not go together with the streams of the recipe, `name` being its own."""

    def fitted(self, encoder: Any, tokenizer: TextTokenizer) -> View:
        """This view with what it takes over from the stream's encoder (the size of images) and the run's tokenizer."""
        return self

    def length(self, tokens: int) -> int:
        """At most how many tokens it leaves of so many; for batches by tokens."""
        return tokens
