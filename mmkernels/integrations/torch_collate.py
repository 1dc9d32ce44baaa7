"""Collate the samples of a pack into a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from mmkernels import PackedBatch

__all__ = ["Collate", "PackCollator", "as_tokens"]

# (samples, their item numbers) -> what a loader yields.
Collate = Callable[[Sequence[Any], Sequence[int]], Any]


class PackCollator:
    """Build a `PackedBatch` from the samples of a pack, padded to the capacity.

    A sample is its tokens, or a mapping that has them: a tensor or list of ids, or anything else that
    `PackedBatch.from_samples` takes as a sample. Fields other than tokens are named here, so that a batch without
    samples, which a rank gets when no pack is left for it, has the same fields.

    Args:
        capacity: tokens of every batch.
        tokens: key of the tokens in a sample that is a mapping.
        labels, loss_weight, modality_ids: keys of further fields; None for absent ones.
        oversize: allow a sample alone in its pack to exceed the capacity (`oversize="own_pack"`).
        **options: of `PackedBatch.from_samples`, such as pad_token.
    """

    def __init__(
        self,
        capacity: int,
        *,
        tokens: str = "tokens",
        labels: str | None = None,
        loss_weight: str | None = None,
        modality_ids: str | None = None,
        oversize: bool = False,
        **options: Any,
    ) -> None:
        self.capacity, self.tokens, self.oversize, self.options = capacity, tokens, oversize, options
        self.fields = {"labels": labels, "loss_weight": loss_weight, "modality_ids": modality_ids}

    def __call__(self, samples: Sequence[Any], items: Sequence[int]) -> PackedBatch:
        """Raise KeyError for a field that a sample lacks, ValueError for samples longer than the capacity."""
        tokens = [as_tokens(s[self.tokens] if isinstance(s, Mapping) else s) for s in samples]
        capacity = self.capacity
        if all(isinstance(each, Tensor) for each in tokens):
            lengths = [len(each) for each in tokens]
            if self.oversize and len(lengths) == 1:
                capacity = max(capacity, *lengths)
            if sum(lengths) > capacity:
                raise ValueError(
                    f"samples: expected at most capacity={capacity} tokens, got {lengths} of items {list(items)}: do "
                    "the planned lengths match the samples?"
                )
        named = {name: key for name, key in self.fields.items() if key is not None}
        further: Any = {name: [torch.as_tensor(sample[key]) for sample in samples] for name, key in named.items()}
        ids = [int(item) for item in items]
        return PackedBatch.from_samples(tokens, capacity=capacity, sample_ids=ids, **self.options, **further)


def as_tokens(tokens: Any) -> Any:
    """Ids as a tensor; `PackedBatch.from_samples` accepts or rejects any sequence that is not of integers."""
    if isinstance(tokens, Tensor) or (isinstance(tokens, Sequence) and not all(map(_is_id, tokens[:1]))):
        return tokens
    return torch.as_tensor(tokens, dtype=torch.int64 if len(tokens) == 0 else None)


def _is_id(token: Any) -> bool:
    return isinstance(token, Integral)
