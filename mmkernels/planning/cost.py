"""The compute cost of a pack: linear and quadratic in tokens, per encoder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmkernels.ops.checks import real, wrong_type, wrong_value
from mmkernels.planning.plan import integer, integers
from mmkernels.planning.plan_result import PackingPlan
from mmkernels.planning.saved import Saved

__all__ = ["AttentionCost", "EncoderCost"]


@dataclass(frozen=True, eq=False)
class EncoderCost(Saved):
    """The work of one encoder (or decoder, or fusion) on an item: linear * tokens + quadratic * pairs.

    Args:
        linear: per token: projections and feed-forward layers.
        quadratic: per pair of a query and a key: attention.
        tokens: [n] integers, the tokens of each item in this encoder; None for all of its tokens.
        pairs: [n] integers, the pairs of each item; None for tokens^2. An encoder that sees several images of an item
            one by one has the sum of their squares; cross-attention has queries * keys.
    """

    linear: float = 24576.0
    quadratic: float = 1.0
    tokens: ArrayLike | None = None
    pairs: ArrayLike | None = None

    def __post_init__(self) -> None:
        for name in ("linear", "quadratic"):
            number = real(name, getattr(self, name), "a number >= 0")
            if not (math.isfinite(number) and number >= 0):
                wrong_value(name, "a number >= 0", number)
            object.__setattr__(self, name, number)

    @classmethod
    def transformer(
        cls,
        width: int,
        layers: int = 1,
        *,
        feed_forward: int | None = None,
        gated: bool = False,
        causal: bool = False,
        tokens: ArrayLike | None = None,
        pairs: ArrayLike | None = None,
    ) -> EncoderCost:
        """Flop of the forward pass: layers * ((8 w^2 + 4 w f) tokens + 4 w pairs), with f the feed-forward width
        (default 4 w; `gated` adds a half to its share, `causal` halves the pairs). The backward pass is twice that."""
        width, layers = integer("width", width, at_least=1), integer("layers", layers, at_least=1)
        hidden = 4 * width if feed_forward is None else integer("feed_forward", feed_forward, at_least=1)
        linear = layers * (8 * width**2 + (6 if gated else 4) * width * hidden)
        return cls(linear, layers * (2 if causal else 4) * width, tokens, pairs)

    def of_items(self, lengths: NDArray[np.int64]) -> NDArray[np.float64]:
        """[n] float64: the cost of each item."""
        n = len(lengths)
        tokens = lengths if self.tokens is None else integers("tokens", self.tokens, n=n)
        if self.pairs is None:
            pairs: Any = tokens.astype(np.float64) ** 2
        else:
            pairs = integers("pairs", self.pairs, n=n).astype(np.float64)
        cost: NDArray[np.float64] = self.linear * tokens.astype(np.float64) + self.quadratic * pairs
        return cost


class AttentionCost(Saved):
    """The work of a model on a pack: the sum over its encoders and items of `EncoderCost`.

        AttentionCost(
            EncoderCost.transformer(1152, 27, tokens=patches, pairs=squares_of_image_patches),  # vision
            EncoderCost.transformer(4096, 32, causal=True, gated=True),                         # language, all tokens
        )

    Attention stays within samples, so the quadratic part is summed over the samples, not the pack.

    Args:
        encoders: each `EncoderCost`; none for one transformer 4096 wide over all tokens (24576 s + s^2 in units of four
            times its width).
    """

    def __init__(self, *encoders: EncoderCost) -> None:
        for i, encoder in enumerate(encoders):
            if not isinstance(encoder, EncoderCost):
                wrong_type(f"encoders[{i}]", "an EncoderCost", encoder)
        self.encoders = encoders or (EncoderCost(),)

    def of_packs(self, plan: PackingPlan) -> NDArray[np.float64]:
        """[P] float64: the cost of each pack. Bitwise equal on every machine: sums run in order."""
        total = np.zeros(len(plan.lengths))
        for encoder in self.encoders:
            total += encoder.of_items(plan.lengths)
        return plan.pack_sums(total)
