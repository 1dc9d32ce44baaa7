"""Samples of a pack to a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mmkernels import PackedBatch

__all__ = ["Collate", "PackCollator"]

# (samples, their item numbers) -> what a loader gives out.
Collate = Callable[[Sequence[Any], Sequence[int]], Any]


class PackCollator:
    """Makes a `PackedBatch` of the samples of a pack, padded to the capacity.

    A sample is a tensor (or list) of tokens, or a mapping that has one. What there is beside tokens is named here, so
    that a batch without samples, which a rank gets when no pack is left for it, has the same fields.

    Args:
        capacity: tokens of every batch.
        tokens: key of the tokens in a sample that is a mapping.
        labels, loss_weight, modality_ids: keys of further fields, or None for those that there are not.
        pad_token: fills the padding.
        oversize: let a sample that is alone in its pack be longer than the capacity (`oversize="own_pack"`).
    """

    def __init__(
        self,
        capacity: int,
        *,
        tokens: str = "tokens",
        labels: str | None = None,
        loss_weight: str | None = None,
        modality_ids: str | None = None,
        pad_token: int = 0,
        oversize: bool = False,
    ) -> None:
        self.capacity, self.tokens, self.pad_token, self.oversize = capacity, tokens, pad_token, oversize
        self.fields = {"labels": labels, "loss_weight": loss_weight, "modality_ids": modality_ids}

    def __call__(self, samples: Sequence[Any], items: Sequence[int]) -> PackedBatch:
        """Raises KeyError for a field that a sample lacks, ValueError for samples longer than the capacity."""
        tokens = [torch.as_tensor(s[self.tokens] if isinstance(s, Mapping) else s) for s in samples]
        lengths = [len(each) for each in tokens]
        alone = self.oversize and len(samples) == 1
        if sum(lengths) > self.capacity and not alone:
            raise ValueError(
                f"samples: expected at most capacity={self.capacity} tokens, got {lengths} of items {list(items)}: "
                "are the lengths that the sampler planned with those of the samples?"
            )
        named = {name: key for name, key in self.fields.items() if key is not None}
        further: Any = {name: [torch.as_tensor(sample[key]) for sample in samples] for name, key in named.items()}
        return PackedBatch.from_samples(
            tokens,
            capacity=max(self.capacity, *lengths) if alone else self.capacity,
            sample_ids=[int(item) for item in items],
            pad_token=self.pad_token,
            **further,
        )
