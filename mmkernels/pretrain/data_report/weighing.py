"""How many tokens a sample has, and what packing samples would gain over padding them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mmkernels import plan_packing
from mmkernels.pretrain.data import Collator, Document, Regions, Text
from mmkernels.pretrain.data_report.scan import Weigh, is_picture
from mmkernels.pretrain.encoders import DocumentImages, DocumentWords, Frozen, Patches, Spectrogram, Tubelets, Words
from mmkernels.pretrain.encoders import Regions as RegionEncoder
from mmkernels.pretrain.recipe import Recipe
from mmkernels.pretrain.tokenizer import TextTokenizer

__all__ = ["Gain", "gain", "weigher"]

_SEED = 0  # of the order of the samples in padded batches


def weigher(recipe: Recipe | None, tokenizer: TextTokenizer, max_tokens: int) -> Weigh:
    """Counts the tokens of a sample's values: as a recipe's encoders do, else as the loop's encoders by default."""
    if recipe is None:
        words = Words(max_tokens=max_tokens)
        return lambda values: sum(_length(name, value, words, tokenizer) for name, value in values.items())
    collator = Collator(recipe.streams, tokenizer)

    def weigh(values: Mapping[str, Any]) -> int:
        total = 0
        for name, stream in collator.streams.items():
            length = stream.encoder.length(values.get(stream.field or name), tokenizer)
            for view in collator.views[name]:
                length = view.length(length)
            total += length
        return total

    return weigh


def _length(name: str, value: Any, words: Words, tokenizer: TextTokenizer) -> int:
    """Of one field."""
    if isinstance(value, str | Text):
        return words.length(value, tokenizer)
    if isinstance(value, Regions):
        return RegionEncoder().length(value, tokenizer)
    if isinstance(value, Document):
        images = DocumentImages(images=Patches()).length(value, tokenizer)
        return DocumentWords(words=words).length(value, tokenizer) + images
    if is_picture(value):
        return Patches().length(value, tokenizer)
    if isinstance(value, np.ndarray) and value.ndim > 1:
        encoder: Any = {"audio": Spectrogram(), "video": Tubelets()}.get(name, Frozen())
        return int(encoder.length(value, tokenizer))
    return 0  # labels, and single vectors


class Gain(NamedTuple):
    """Padded batches against packs."""

    tokens: int  # of all samples
    padded: int  # places of batches padded to their longest sample
    batch: int  # samples of such a batch
    packed: int  # places of packs
    packs: int
    capacity: int  # places of a pack
    own_packs: int  # samples longer than that, which are packs of their own

    @property
    def padding(self) -> float:
        """Share of padded batches that is padding."""
        return 1 - self.tokens / self.padded

    @property
    def unused(self) -> float:
        """Share of packs that is left unused."""
        return 1 - self.tokens / self.packed

    @property
    def saved(self) -> float:
        """Share of the places of padded batches that packs do without."""
        return 1 - self.packed / self.padded


def gain(lengths: np.ndarray, batch: int, capacity: int) -> Gain | None:
    """What packing gains for samples of these lengths, int64 [n]; None if there are no tokens."""
    lengths = np.random.Generator(np.random.Philox(_SEED)).permutation(lengths[lengths > 0])
    if not len(lengths):
        return None
    capacity = min(capacity, int(lengths.sum()))  # a set that fits into one pack fills it
    longest = np.maximum.reduceat(lengths, np.arange(0, len(lengths), batch))
    sizes = np.diff([*range(0, len(lengths), batch), len(lengths)])
    plan = plan_packing(lengths, capacity, oversize="own_pack")
    over = int((lengths > capacity).sum())
    packed = (plan.num_packs - over) * capacity + int(lengths[lengths > capacity].sum())
    return Gain(int(lengths.sum()), int((longest * sizes).sum()), batch, packed, plan.num_packs, capacity, over)
