"""From the outputs of a processor or tokenizer of transformers, one per sample, to packed batches.

collator = PackedCollator.from_config(model.config)
Trainer(model, data_collator=collator.inputs, ...)          # each batch in one row, without padding
PackedDataset(dataset, collate=collator)                    # planned packs, as PackedBatch
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import transformers
from torch import Tensor

from mmkernels import Media, Modality, PackedBatch
from mmkernels.integrations.transformers.samples import Placeholders, Sample, read

__all__ = ["PackedCollator"]


class PackedCollator:
    """Collate processor outputs to a `PackedBatch`, or (`inputs`) to the arguments of a model.

    A sample is a mapping with input_ids, and optionally attention_mask, labels, token_type_ids, mm_token_type_ids,
    pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw and second_per_grid_ts, as a processor returns
    them for one sample: lists or tensors, with or without a batch dimension of 1. Any other key is an error, unless it
    is in `ignore` or None. Tokens that attention_mask leaves out are padding and are removed. Images and clips stand
    where their placeholder tokens are; their numbers of tokens must be those of the placeholders, so that a sample
    whose tokens were truncated is an error.

    Args:
        capacity: tokens of every batch, as in `PackedBatch.from_samples`; None for no padding.
        image_token, video_token: ids of the placeholder tokens.
        merge_size: patches per side that one token covers, where images have grids.
        mrope, tokens_per_second, pad_token: of `PackedBatch.from_samples`.
        labels: whether every sample has labels, or none; None: as they come, and none in a batch without samples.
        ignore: keys to leave out.

    Raises:
        TypeError, ValueError: while collating, whatever does not fit, by key and sample.
    """

    def __init__(
        self,
        *,
        capacity: int | None = None,
        image_token: int | None = None,
        video_token: int | None = None,
        merge_size: int = 1,
        mrope: bool | str = False,
        tokens_per_second: float = 1.0,
        pad_token: int = 0,
        labels: bool | None = None,
        ignore: Sequence[str] = (),
    ) -> None:
        if isinstance(ignore, str):
            raise TypeError(f"ignore: expected a sequence of keys, got {ignore!r}")
        self.capacity, self.mrope, self.labels, self.ignore = capacity, mrope, labels, frozenset(ignore)
        self.tokens_per_second, self.pad_token = tokens_per_second, pad_token
        self.placeholders = Placeholders(image_token, video_token, merge_size, timed=tokens_per_second != 1)

    @classmethod
    def from_config(cls, config: Any, **options: Any) -> PackedCollator:
        """With the placeholder tokens, merge_size, mrope, tokens_per_second and pad_token of a model's configuration,
        where `options` do not say otherwise. Warn of a model whose own attention gets such rows wrong."""
        text, vision = config.get_text_config(), getattr(config, "vision_config", None)
        own = getattr(config, "_attn_implementation", None) in ("eager", "sdpa", "flex_attention")
        if own and vision is not None and "gemma3" in str(config.model_type):
            # remap_positions_for_packed_sequence (5.24) renumbers the tokens by which an image's block is looked up.
            warnings.warn(
                "in rows of several samples transformers' own masks take the images of Gemma 3 at wrong places in its "
                "sliding layers, if there are token_type_ids; attn_implementation='mmkernels' does not",
                stacklevel=2,
            )
        known: dict[str, Any] = {"pad_token": text.pad_token_id or 0}
        for name in ("image_token", "video_token"):
            ids = (getattr(config, f"{name}_{end}", None) for end in ("id", "index"))
            known[name] = next((number for number in ids if number is not None), None)
        known["merge_size"] = getattr(vision, "spatial_merge_size", 1)
        if "mrope_section" in (getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}):
            release = tuple(int(part) for part in transformers.__version__.split(".")[:2])
            known["mrope"] = "spatial" if release >= (5, 3) else "largest"
            known["tokens_per_second"] = getattr(vision, "tokens_per_second", 1.0)
        return cls(**known | options)

    def __call__(self, samples: Sequence[Mapping[str, Any]], items: Sequence[int] | None = None) -> PackedBatch:
        """The samples of a pack, and their item numbers, as `PackedDataset` passes them.

        Images of a tower of fixed size are media without a grid: [1, channels, height, width] each.
        """
        return self._batch([self._read(samples, i) for i in range(len(samples))], items)

    def inputs(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The arguments of a model, `to_hf()` of the batch: the `data_collator` of `Trainer`.

        With token_type_ids or mm_token_type_ids if samples have them, and pixel_values [1, images, ...] if samples have
        it so (Idefics).
        """
        found = [self._read(samples, i) for i in range(len(samples))]
        nested = {each.nested for each in found if each.nested is not None}
        if len(nested) > 1:
            raise ValueError("pixel_values: expected a batch dimension in all samples or in none, got both")
        batch = self._batch(found, None)
        mrope = self.mrope is not False
        arguments = batch.to_hf(mrope=mrope)
        for key in {key for each in found for key in each.types}:
            arguments[key] = batch.to_hf(mrope=mrope, types=key)[key]
        if nested == {True}:
            arguments["pixel_values"] = arguments["pixel_values"][None]
        return arguments

    def _read(self, samples: Sequence[Mapping[str, Any]], i: int) -> Sample:
        sample = samples[i]
        if not isinstance(sample, Mapping):
            raise TypeError(f"samples[{i}]: expected a mapping with input_ids, got {type(sample).__name__}")
        given = {key: value for key, value in sample.items() if value is not None and key not in self.ignore}
        try:
            found = read(given, self.placeholders)
        except (TypeError, ValueError) as error:
            raise type(error)(f"samples[{i}]: {error}") from error
        if self.labels is not None and self.labels != (found.labels is not None):
            got = "none" if self.labels else "some"
            raise ValueError(f"samples[{i}]: labels: expected {'some' if self.labels else 'none'}, got {got}")
        return found

    def _batch(self, samples: list[Sample], items: Sequence[int] | None) -> PackedBatch:
        labels = [sample.labels for sample in samples if sample.labels is not None]
        if labels and len(labels) < len(samples):
            raise ValueError(f"samples: expected labels in all or none, got {len(labels)} of {len(samples)}")
        tokens = {Modality.IMAGE: self.placeholders.image, Modality.VIDEO: self.placeholders.video}
        parts: list[list[Tensor | Media]] = [sample.parts for sample in samples]
        return PackedBatch.from_samples(
            parts,
            capacity=self.capacity,
            sample_ids=None if items is None else [int(item) for item in items],
            labels=labels if labels or self.labels else None,
            pad_token=self.pad_token,
            placeholder={modality: token for modality, token in tokens.items() if token is not None},
            mrope=self.mrope,
            tokens_per_second=self.tokens_per_second,
        )
