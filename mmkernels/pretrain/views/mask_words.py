"""Hide tokens of a text, to be predicted.

Source: Devlin et al. 2019 (arXiv:1810.04805): of the chosen tokens 80% become [MASK], 10% another token, 10% stay.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

from mmkernels.pretrain.data.seeds import Draws
from mmkernels.pretrain.tokenizer import MASK, SPECIAL, TextTokenizer
from mmkernels.pretrain.views.base import View

__all__ = ["MaskWords"]


@dataclass(frozen=True)
class MaskWords(View):
    """Choose tokens at random; each text with a word has at least one."""

    share: float = 0.15
    """Of the tokens, special ones left out."""
    static: bool = False
    """The same tokens of a text at every step (BERT), rather than others (RoBERTa)."""

    vocabulary: int = 0
    """Other tokens are drawn below this id; 0: from the whole tokenizer."""

    of_tokens: ClassVar[bool] = True
    evaluated: ClassVar[bool] = True
    masks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share: expected 0 < share <= 1, got {self.share}")

    def __call__(self, values: Sequence[Any], draws: Draws, labels: MutableMapping[str, np.ndarray]) -> list[Any]:
        """Pieces of ids [L]: labels are the ids at the chosen tokens, -100 elsewhere."""
        if self.static:
            draws = Draws(draws.seed, 0, draws.purpose, draws.samples)
        return [self._masked(piece, draws.generator(i)) for i, piece in enumerate(values)]

    def fitted(self, encoder: Any, tokenizer: TextTokenizer) -> View:
        return self if self.vocabulary else replace(self, vocabulary=len(tokenizer))

    def _masked(self, piece: Any, random: np.random.Generator) -> Any:
        ids = np.asarray(piece.tokens)
        words = np.flatnonzero(ids >= len(SPECIAL))
        target = np.full(len(ids), -100, np.int64)
        if len(words):
            count = max(1, int(len(words) * self.share + random.random()))
            chosen = random.choice(words, min(count, len(words)), replace=False)
            target[chosen] = ids[chosen]
            kind = random.random(len(chosen))
            ids = ids.copy()
            ids[chosen[kind < 0.8]] = MASK
            other = chosen[(kind >= 0.8) & (kind < 0.9)]
            ids[other] = random.integers(len(SPECIAL), self.vocabulary, len(other))
        return replace(piece, tokens=torch.from_numpy(ids), labels=torch.from_numpy(target))
