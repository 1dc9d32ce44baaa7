"""Replace spans of a text by sentinels; a second stream has what they stand for.

    text    to be or not to be that is the question
    input   to be [S0] to be that [S1] question
    target  [S0] or not [S1] is the

Source: Raffel et al. 2020 (T5, arXiv:1910.10683).
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from mmkernels.pretrain.data.seeds import Draws
from mmkernels.pretrain.recipe import Stream
from mmkernels.pretrain.tokenizer import BOS, EOS, SPECIAL, sentinel
from mmkernels.pretrain.views.base import View

__all__ = ["CorruptSpans"]


@dataclass(frozen=True)
class CorruptSpans(View):
    """Two streams of one field draw the same spans: one takes the input, the other the target."""

    share: float = 0.15
    """Of the tokens, special ones left out, that are in spans; at least one is."""
    mean: float = 3.0
    """Tokens of a span on average."""
    part: Literal["input", "target"] = "input"
    """Which of the two this stream gets."""

    of_tokens: ClassVar[bool] = True
    evaluated: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share: expected 0 < share <= 1, got {self.share}")
        if not self.mean >= 1:
            raise ValueError(f"mean: expected at least 1 token, got {self.mean}")
        if self.part not in ("input", "target"):
            raise ValueError(f"part: expected 'input' or 'target', got {self.part!r}")

    def check(self, name: str, streams: Mapping[str, Stream]) -> None:
        """The other part of the same text must be drawn alike, and cut alike before."""
        own = streams[name]
        for other, stream in streams.items():
            partners = [view for view in stream.views if isinstance(view, CorruptSpans)]
            if not partners or (stream.field or other) != (own.field or name):
                continue
            lengths = [getattr(each.encoder, "max_tokens", None) for each in (stream, own)]
            pairs = [("encoder.max_tokens", *lengths)]
            pairs += [(f"views.{x}", getattr(partners[0], x), getattr(self, x)) for x in ("share", "mean", "salt")]
            for what, theirs, mine in pairs:
                if theirs != mine:
                    same = f"{theirs}, as in streams.{other}, which has the other part of the same text"
                    raise ValueError(f"streams.{name}.{what}: expected {same}, got {mine}")

    def __call__(self, values: Sequence[Any], draws: Draws, labels: MutableMapping[str, np.ndarray]) -> list[Any]:
        """Pieces of ids [L]. An input has no labels, a target is its own."""
        return [self._corrupted(piece, draws.generator(i)) for i, piece in enumerate(values)]

    def length(self, tokens: int) -> int:
        if self.part == "input":
            return tokens
        return sum(self._counts(tokens)) + 2 if tokens else 0

    def _corrupted(self, piece: Any, random: np.random.Generator) -> Any:
        ids = np.asarray(piece.tokens)
        words = np.flatnonzero(ids >= len(SPECIAL))
        hidden, spans = self._counts(len(words))
        sizes = _parts(hidden, spans, random)
        # One more on either side, so that a text may begin and end with a span.
        gaps = _parts(len(words) - hidden + 2, spans + 1, random)
        firsts = np.cumsum(gaps)[:-1] - 1 + np.cumsum(sizes) - sizes
        places = [words[first : first + size] for first, size in zip(firsts, sizes, strict=True)]
        if self.part == "target":
            shown = [np.concatenate([[sentinel(n)], ids[at]]) for n, at in enumerate(places)]
            target = _ids([[BOS], *shown, [EOS]] if shown else [])
            return replace(piece, tokens=target, labels=target)
        kept = ids.copy()
        for n, at in enumerate(places):
            kept[at] = -1
            kept[at[0]] = sentinel(n)
        return replace(piece, tokens=torch.from_numpy(kept[kept >= 0]), labels=None)

    def _counts(self, words: int) -> tuple[int, int]:
        """(Those of some words that are in spans, spans): with a word between any two of them."""
        hidden = min(max(round(words * self.share), 1), words)
        return hidden, min(max(round(hidden / self.mean), 1), hidden, words - hidden + 1)


def _parts(total: int, parts: int, random: np.random.Generator) -> np.ndarray:
    """int64 [parts], at least 1 each, that add up to `total`; all ways are as likely."""
    if not parts:
        return np.zeros(0, np.int64)
    cuts = np.sort(random.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]])).astype(np.int64)


def _ids(parts: Sequence[Any]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64))
