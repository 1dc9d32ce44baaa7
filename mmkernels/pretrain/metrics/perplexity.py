"""Perplexity of held-out texts, beside that of counted n-grams.

Source: the bigram model is interpolated Kneser-Ney: Kneser and Ney 1995; Chen and Goodman 1999.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from mmkernels.pretrain.data.base import Text
from mmkernels.pretrain.data.spaced import spaced
from mmkernels.pretrain.metrics.base import Figure, HeldOut
from mmkernels.pretrain.metrics.judged import concepts_of
from mmkernels.pretrain.tokenizer import SPECIAL

__all__ = ["Bigrams", "Perplexity"]


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean loss of next or masked tokens. Chance is a unigram model of the training texts, which does not
    look at what comes before a token; a bigram model, which looks at one token (at the right one, also where that is
    masked too), has a figure of its own. All of them predict the same tokens."""

    objective: str = ""
    """Name of the objective, a `NextToken` or `MaskedTokens`."""
    texts: int = 20_000
    """Most training samples, evenly spaced, whose texts n-grams are counted on: all of each."""

    def measure(self, model: Any, held_out: HeldOut) -> list[Figure]:
        objective: Any = dict(model.objectives.items()).get(self.objective)
        if not (hasattr(objective, "followed") or hasattr(objective, "masked")):
            raise ValueError(
                f"metrics: Perplexity: expected an objective of next or masked tokens, got {self.objective!r}"
            )
        key = ("n-grams", self.objective, str(self.texts))
        counted = held_out.once(key, lambda: self._counted(held_out, objective))
        sums: list[np.ndarray] = []
        concepts: list[np.ndarray] = []
        for batch in held_out.batches("loss", objective=self.objective):
            chunk = model.whole(batch, self.objective)
            logits, targets = objective.logits(chunk)
            packed: Any = batch[objective.stream]
            if hasattr(objective, "followed"):
                before = packed.tokens[objective.followed(chunk)[0]]
            else:
                before = torch.where(packed.labels >= 0, packed.labels, packed.tokens)[objective.masked(chunk)[0] - 1]
            losses = F.cross_entropy(logits.double(), targets, reduction="none").cpu().numpy()
            own, after = before.cpu().numpy(), targets.cpu().numpy()
            bigrams, unigrams = counted.bigram(own, after), counted.unigram(after)
            sums.append(np.stack([losses, -bigrams, -unigrams, np.ones_like(losses)], 1))
            concepts.append(concepts_of(batch, objective.owners(chunk)))
        if not sum(map(len, sums)):
            return []
        every, clusters = np.concatenate(sums), np.concatenate(concepts)
        chance = float(_perplexity(every[:, [2, 3]].sum(0, keepdims=True))[0])
        more: dict[str, Any] = {"percent": False, "higher_is_better": False, "clusters": clusters}
        return [
            Figure.of_sums(
                f"{self.objective}: {name}", every[:, [column, 3]], _perplexity, chance, headline=column == 0, **more
            )
            for column, name in enumerate(("perplexity", "perplexity of bigrams"))
        ]

    def _counted(self, held_out: HeldOut, objective: Any) -> Bigrams:
        """Of the training texts: of what follows what where next tokens are asked for, of all words where masked ones
        are."""
        source, masked, stream = held_out.train, hasattr(objective, "masked"), objective.stream
        field = held_out.collator.streams[stream].field or stream
        before, after = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        items = spaced(len(source), self.texts).tolist()
        texts = ((item, {field: text}) for item in items for text in _texts(source.peek(item).get(field)))
        while some := list(islice(texts, held_out.samples)):
            numbers, values = zip(*some, strict=True)
            packed = held_out.collator.packed(stream, values, numbers, "plain" if masked else "loss")
            tokens = packed.tokens.numpy()
            follows = np.append(tokens[1:], -1) if masked else packed.next_labels().numpy()
            asked = follows >= len(SPECIAL) if masked else follows >= 0  # a text begins with a special token
            before.append(tokens[asked])
            after.append(follows[asked])
        return Bigrams(np.concatenate(before), np.concatenate(after), objective.vocabulary)


def _texts(value: Any) -> list[Any]:
    """Each of a value's texts alone, since the model learns from all of them."""
    return [value._replace(captions=(each,)) for each in value.captions] if isinstance(value, Text) else [value]


def _perplexity(sums: np.ndarray) -> np.ndarray:
    """Of [B, 2]: a sum of losses, and their number."""
    found: np.ndarray = np.exp(sums[:, 0] / sums[:, 1])
    return found


class Bigrams:
    """Probabilities of a token alone, and given the one before it.

        unigram  (c(w) + 1) / (n + V)
        bigram   max(c(v, w) - D, 0) / c(v) + D t(v) / c(v) (t(w) + 1) / (t + V)

    with counts c, and numbers t of different tokens after v, before w, and of pairs; D = n1 / (n1 + 2 n2) of the pairs
    seen once and twice.

    Args:
        before, after: int64 [n], the pairs (v, w).
        vocabulary: V, number of tokens.
    """

    def __init__(self, before: np.ndarray, after: np.ndarray, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self._single = np.bincount(after, minlength=vocabulary)
        self._pairs, self._times = np.unique(before * vocabulary + after, return_counts=True)
        first, second = np.divmod(self._pairs, vocabulary)
        self._before = np.bincount(before, minlength=vocabulary)
        self._kinds_after = np.bincount(first, minlength=vocabulary)
        self._kinds_before = np.bincount(second, minlength=vocabulary)
        once, twice = (self._times == 1).sum(), (self._times == 2).sum()
        self._discount = once / (once + 2 * twice) if once else 0.5

    def unigram(self, after: np.ndarray) -> np.ndarray:
        """float64 [m]: log probabilities of tokens."""
        return np.log((self._single[after] + 1) / (self._single.sum() + self.vocabulary))

    def bigram(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """float64 [m]: log probabilities of tokens given those before them."""
        pairs = before * self.vocabulary + after
        place = np.searchsorted(self._pairs, pairs)
        found = np.append(self._pairs, -1)[place] == pairs
        times = np.where(found, np.append(self._times, 0)[place], 0)
        seen = self._before[before]
        backed = (self._kinds_before[after] + 1) / (len(self._pairs) + self.vocabulary)
        own = np.maximum(times - self._discount, 0) / np.maximum(seen, 1)
        left = np.where(seen > 0, self._discount * self._kinds_after[before] / np.maximum(seen, 1), 1.0)
        return np.log(own + left * backed)
