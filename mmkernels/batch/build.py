"""Validate samples and build the fields of a `PackedBatch` from them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels.batch.fields import IGNORE_LABEL, NO_SAMPLE, NO_SPAN, PackedFields
from mmkernels.batch.media import Media, PackedMedia
from mmkernels.ops.checks import FLOATING, expect_tensor, integer, wrong_type, wrong_value
from mmkernels.ops.modality import MAX_MODALITIES, Modality
from mmkernels.ops.packing import mrope_position_ids

__all__ = ["lay_out"]

Placeholder = int | Mapping[int, int]


def lay_out(
    samples: Sequence[Tensor | Sequence[Tensor | Media]],
    *,
    capacity: int | None,
    sample_ids: Sequence[int] | None,
    per_token: Mapping[str, Sequence[Tensor] | None],
    sample_weight: Sequence[float] | None,
    pad_token: int,
    placeholder: Placeholder,
    mrope: bool | str,
    tokens_per_second: float,
) -> PackedFields:
    """See `PackedBatch.from_samples`."""
    if not isinstance(mrope, bool) and mrope not in ("spatial", "largest"):
        wrong_value("mrope", 'False, True, "spatial" or "largest"', mrope)
    if not mrope and tokens_per_second != 1:
        wrong_value("tokens_per_second", "1 without mrope", tokens_per_second)
    parts = _parts(samples)
    like = _like(parts)
    whole = [_tokens(part, placeholder, like) for part in parts]
    lengths, device = _lengths(whole), like.device
    total = sum(lengths)
    padding = 0 if capacity is None else integer("capacity", capacity, "an integer >= 0 or None") - total
    if padding < 0:
        raise ValueError(f"capacity: expected at least the {total} tokens of the samples, got {capacity}")
    ids = _ids(sample_ids, len(samples))

    segments = lengths + [padding] * (padding > 0)
    ends = (0, *itertools.accumulate(segments))
    sizes = torch.tensor(segments, dtype=torch.int64)
    begins = torch.tensor(ends[:-1], dtype=torch.int64).repeat_interleave(sizes)
    owners = torch.tensor(ids + [NO_SAMPLE] * (padding > 0), dtype=torch.int64).repeat_interleave(sizes)
    cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    items, starts = _media(parts, ends)
    kinds, spans = _spans(items, starts, ends[-1])

    def joined(name: str, dtype: torch.dtype, fill: float) -> Tensor | None:
        given = per_token[name]
        if given is None:
            return None
        _check_parts(name, given, lengths, dtype)
        return _join([part.to(device, dtype) for part in given], padding, fill, dtype, device)

    own_kinds = joined("modality_ids", torch.uint8, Modality.TEXT)
    if own_kinds is not None and items:
        wrong_value("modality_ids", "None for samples with media, which determine it", per_token["modality_ids"])
    return PackedFields(
        tokens=_join(whole, padding, pad_token, torch.int64, device),
        cu_seqlens=cu_seqlens.to(device),
        cu_seqlens_host=ends,
        sample_ids=owners.to(device),
        position_ids=_positions(items, starts, cu_seqlens, begins, mrope, tokens_per_second).to(device),
        modality_ids=kinds.to(device) if own_kinds is None else own_kinds,
        span_ids=spans.to(device),
        padding=padding,
        labels=joined("labels", torch.int64, IGNORE_LABEL),
        loss_weight=joined("loss_weight", torch.float32, 0.0),
        sample_weight=_sample_weight(sample_weight, len(samples), device),
        media=_packed_media(items, starts, device),
    )


def _parts(samples: Any) -> list[list[Tensor | Media]]:
    """Each sample as a list of its parts."""
    if isinstance(samples, Tensor) or not isinstance(samples, Sequence):
        wrong_type("samples", "a sequence of tensors [L, ...] or of sequences of parts", samples)
    found = []
    for i, sample in enumerate(samples):
        if isinstance(sample, Tensor | Media):
            sample = [sample]
        if not isinstance(sample, Sequence) or not all(isinstance(part, Tensor | Media) for part in sample):
            wrong_type(f"samples[{i}]", "a tensor [L, ...], or a sequence of tensors and Media", sample)
        found.append(list(sample))
    return found


def _like(samples: list[list[Tensor | Media]]) -> Tensor:
    """The first token tensor, which sets dtype and device; without one, int64 on the device of the first media."""
    every = [part for parts in samples for part in parts]
    given = next((part for part in every if isinstance(part, Tensor)), None)
    if given is not None:
        return given
    device = next((part.values.device for part in every if isinstance(part, Media)), None)
    return torch.empty(0, dtype=torch.int64, device=device)


def _tokens(parts: list[Tensor | Media], placeholder: Placeholder, like: Tensor) -> Tensor:
    """A sample's tokens, with placeholders for its media."""
    if len(parts) == 1 and isinstance(parts[0], Tensor):
        return parts[0]
    pieces = []
    for part in parts:
        if isinstance(part, Tensor):
            expect_tensor(
                "samples: token ids beside media", part, "[n] int64", ndim=1, dtypes=(torch.int64, torch.int32)
            )
            pieces.append(part)
            continue
        if isinstance(placeholder, Mapping):
            if part.modality not in placeholder:
                wrong_value("placeholder", f"an id for modality {int(part.modality)}", dict(placeholder))
            fill = placeholder[part.modality]
        else:
            fill = placeholder
        pieces.append(like.new_full((part.length,), fill))
    return torch.cat(pieces) if pieces else like.new_empty((0, *like.shape[1:]))


def _lengths(samples: list[Tensor]) -> list[int]:
    """Lengths of the samples, which must agree in dtype, device and trailing dimensions."""
    for i, sample in enumerate(samples):
        first = samples[0]
        if sample.ndim < 1 or sample.shape[1:] != first.shape[1:]:
            wrong_value(
                f"samples[{i}]", f"[L, ...] with the trailing dimensions of samples[0], {list(first.shape[1:])}", sample
            )
        if sample.dtype != first.dtype or sample.device != first.device:
            wrong_value(f"samples[{i}]", f"{first.dtype} on {first.device} like samples[0]", sample)
    return [sample.shape[0] for sample in samples]


def _ids(sample_ids: Sequence[int] | None, samples: int) -> list[int]:
    ids = [integer("sample_ids", i, "ids >= 0") for i in (range(samples) if sample_ids is None else sample_ids)]
    if len(ids) != samples or any(i < 0 for i in ids):
        wrong_value("sample_ids", f"{samples} ids >= 0", sample_ids)
    return ids


def _media(parts: list[list[Tensor | Media]], ends: tuple[int, ...]) -> tuple[list[Media], list[int]]:
    """All items in token order, and the first token of each."""
    items, starts = [], []
    for sample, at in zip(parts, ends, strict=False):
        for part in sample:
            if isinstance(part, Media):
                items.append(part)
                starts.append(at)
            at += part.length if isinstance(part, Media) else part.shape[0]
    return items, starts


def _spans(items: list[Media], starts: list[int], total: int) -> tuple[Tensor, Tensor]:
    """(modality_ids [T] uint8, span_ids [T] int32)."""
    kinds = torch.full((total,), int(Modality.TEXT), dtype=torch.uint8)
    spans = torch.full((total,), NO_SPAN, dtype=torch.int32)
    for n, (item, start) in enumerate(zip(items, starts, strict=True)):
        kinds[start : start + item.length] = int(item.modality)
        spans[start : start + item.length] = n
    return kinds, spans


def _positions(
    items: list[Media],
    starts: list[int],
    cu_seqlens: Tensor,
    begins: Tensor,
    mrope: bool | str,
    tokens_per_second: float,
) -> Tensor:
    """[T], or [3, T] with `mrope`."""
    total = begins.shape[0]
    if not mrope:
        return torch.arange(total) - begins
    grids, places, steps = [], [], []
    for i, (item, start) in enumerate(zip(items, starts, strict=True)):
        if item.grid_thw is None:
            continue
        t, h, w = item.grid_thw
        places.append(start)
        # Merged grids, so that items with different merge sizes can be mixed.
        grids.append((t, h // item.merge_size, w // item.merge_size))
        if item.time_step is None and t > 1 and tokens_per_second != 1:
            wrong_value(f"media {i}: time_step", "seconds per step, which tokens_per_second multiplies", None)
        steps.append(1.0 if item.time_step is None else item.time_step)
    timed = any(item.time_step is not None for item in items) or tokens_per_second != 1
    return mrope_position_ids(
        cu_seqlens,
        torch.tensor(grids, dtype=torch.int64).reshape(-1, 3),
        torch.tensor(places, dtype=torch.int64),
        total,
        merge_size=1,
        advance="spatial" if mrope is True else mrope,
        time_step=torch.tensor(steps, dtype=torch.float32) if timed else None,
        tokens_per_second=tokens_per_second,
    )


def _packed_media(items: list[Media], starts: list[int], device: torch.device) -> dict[int, PackedMedia]:
    """modality -> its items."""
    packed = {}
    for modality in sorted({int(item.modality) for item in items}):
        own = [(item, start) for item, start in zip(items, starts, strict=True) if item.modality == modality]
        packed[modality] = PackedMedia.of([item for item, _ in own], [start for _, start in own], device)
    return packed


def _sample_weight(weights: Sequence[float] | None, samples: int, device: torch.device) -> Tensor | None:
    if weights is None:
        return None
    values = torch.as_tensor(weights, dtype=torch.float32)
    if values.shape != (samples,) or not bool((values >= 0).all()):
        wrong_value("sample_weight", f"{samples} floats >= 0", weights)
    return values.to(device)


def _check_parts(name: str, parts: Sequence[Tensor], lengths: list[int], dtype: torch.dtype) -> None:
    """One tensor [L_i] per sample that fits into `dtype` without loss."""
    if len(parts) != len(lengths):
        wrong_value(name, f"one tensor for each of {len(lengths)} samples", f"{len(parts)} tensors")
    for i, (part, length) in enumerate(zip(parts, lengths, strict=True)):
        expected = f"[{length}] {'floating point' if dtype.is_floating_point else 'integer'}"
        integers = (torch.int64, torch.int32, torch.int16, torch.uint8)
        expect_tensor(f"{name}[{i}]", part, expected, ndim=1, dtypes=FLOATING if dtype.is_floating_point else integers)
        if part.shape[0] != length:
            wrong_value(f"{name}[{i}]", expected, part)
        if dtype == torch.uint8 and length and not 0 <= int(part.min()) <= int(part.max()) < MAX_MODALITIES:
            raise ValueError(
                f"{name}[{i}]: expected ids in [0, {MAX_MODALITIES}), got {int(part.min())}..{int(part.max())}"
            )


def _join(parts: list[Tensor], padding: int, fill: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The parts, then `padding` entries of `fill`; `dtype` and `device` apply when there are no parts."""
    like = parts[0] if parts else torch.empty(0, dtype=dtype, device=device)
    tail = like.new_full((padding, *like.shape[1:]), fill)
    return torch.cat([*parts, tail])
