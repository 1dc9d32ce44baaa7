"""Check the invariants of a `PackedBatch` one by one; the error names the broken one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.batch.fields import IGNORE_LABEL, NO_SAMPLE, NO_SPAN, PackedFields
from mmkernels.batch.media import PackedMedia
from mmkernels.ops.modality import MAX_MODALITIES

__all__ = ["check"]

_PER_TOKEN = ("tokens", "sample_ids", "modality_ids", "span_ids", "labels", "loss_weight")


def check(batch: PackedFields) -> None:
    """Raise a ValueError that names the first broken invariant."""
    _check_boundaries(batch)
    for name in _PER_TOKEN:
        _check_field(batch, name, getattr(batch, name), (batch.num_tokens,), "T")
    _check_field(batch, "sample_weight", batch.sample_weight, (batch.num_samples,), "S")
    _check_positions(batch)
    _check_samples(batch)
    _check_padding(batch)
    _check_media(batch)


def _check_boundaries(batch: PackedFields) -> None:
    host, total = batch.cu_seqlens_host, batch.num_tokens
    _require(len(host) > 0 and host[0] == 0, "cu_seqlens", "begins with 0", host[:1])
    _require(host[-1] == total, "cu_seqlens", f"ends with T = {total}", host[-1])
    falls = [i for i, length in enumerate(batch.lengths) if length < 0]
    _require(not falls, "cu_seqlens", "does not decrease", f"a decrease after entry {falls[:1]}")
    device = (batch.cu_seqlens.dtype, tuple(batch.cu_seqlens.tolist()))
    _require(device == (torch.int32, host), "cu_seqlens", "is int32 and equal to cu_seqlens_host", device)
    last = batch.lengths[-1] if batch.lengths else 0
    _require(batch.padding in (0, last), "padding", "is the last segment", batch.padding)


def _check_field(batch: PackedFields, name: str, value: Tensor | None, shape: tuple[int, ...], letter: str) -> None:
    if value is not None:
        sizes = value.shape[: len(shape)]
        _require(sizes == shape, name, f"has {letter} = {shape[0]} entries", list(value.shape))
        _require(value.device == batch.tokens.device, name, f"is on {batch.tokens.device}", value.device)


def _check_positions(batch: PackedFields) -> None:
    positions, total = batch.position_ids, batch.num_tokens
    shapes = ((total,), (3, total))
    _require(tuple(positions.shape) in shapes, "position_ids", f"is [T] or [3, T], T = {total}", list(positions.shape))
    _require(positions.device == batch.tokens.device, "position_ids", f"is on {batch.tokens.device}", positions.device)
    positions, begins = positions.cpu(), _begins(batch)
    if positions.ndim == 1:
        _require_equal(positions, torch.arange(total) - begins, "position_ids", "counts from 0 in each segment")
        return
    firsts = torch.arange(total) == begins
    _require_equal(
        positions[:, firsts].amax(0), torch.zeros(int(firsts.sum())), "position_ids", "begins with 0 in a segment"
    )
    _require(bool((positions >= 0).all()), "position_ids", "is >= 0", positions.min() if total else 0)


def _begins(batch: PackedFields) -> Tensor:
    """[T]: where each token's segment begins."""
    sizes = torch.tensor(batch.lengths, dtype=torch.int64)
    return torch.tensor(batch.cu_seqlens_host[:-1], dtype=torch.int64).repeat_interleave(sizes)


def _check_samples(batch: PackedFields) -> None:
    owners = batch.sample_ids.cpu()
    _require_equal(owners, owners[_begins(batch)], "sample_ids", "is the same in a whole segment")
    real = batch.num_tokens - batch.padding
    _require(bool((owners[:real] >= 0).all()), "sample_ids", "is >= 0 outside the padding", owners[:real])
    _require(bool((owners[real:] == NO_SAMPLE).all()), "sample_ids", "is -1 in the padding", owners[real:])
    sizes = torch.tensor(batch.lengths[: batch.num_samples], dtype=torch.int64)
    starts = torch.tensor(batch.cu_seqlens_host[: batch.num_samples], dtype=torch.int64)
    heads = owners[starts[sizes > 0]]
    _require(len(heads.unique()) == len(heads), "sample_ids", "names each sample once", heads)
    kinds = batch.modality_ids
    _require(kinds.dtype == torch.uint8, "modality_ids", "is uint8", kinds)
    _require(bool((kinds < MAX_MODALITIES).all()), "modality_ids", "is below 32", kinds)
    if batch.sample_weight is not None:
        _require(bool((batch.sample_weight >= 0).all()), "sample_weight", "is >= 0", batch.sample_weight)


def _check_padding(batch: PackedFields) -> None:
    real = batch.num_tokens - batch.padding
    for name, value, nothing in (
        ("labels", batch.labels, IGNORE_LABEL),
        ("loss_weight", batch.loss_weight, 0),
        ("span_ids", batch.span_ids, NO_SPAN),
    ):
        if value is not None:
            _require(bool((value[real:] == nothing).all()), name, f"is {nothing} in the padding", value)


def _check_media(batch: PackedFields) -> None:
    """Each item lies whole in one sample, on tokens of its modality and of one span; spans are numbered in order."""
    kinds, spans = batch.modality_ids.cpu(), batch.span_ids.cpu()
    _require(spans.dtype == torch.int32, "span_ids", "is int32", spans)
    begins = _begins(batch)
    starts = sorted(start for media in batch.media.values() for start in media.starts_host)
    numbers = {start: n for n, start in enumerate(starts)}
    covered = torch.full_like(spans, NO_SPAN)
    for modality, media in batch.media.items():
        name = f"media[{int(modality)}]"
        _check_layout(batch, name, media)
        places = media.dst_index.cpu().split(media.tokens_host)
        for start, tokens, place in zip(media.starts_host, media.tokens_host, places, strict=True):
            end = start + tokens
            _require(0 <= start < end <= len(spans), name, "lies in the batch", (start, end))
            _require_equal(place, torch.arange(start, end), f"{name}.dst_index", "is each item's tokens in order")
            _require(bool(begins[start] == begins[end - 1]), name, "has each item whole in one sample", (start, end))
            _require(
                bool((kinds[start:end] == modality).all()), "modality_ids", f"is {int(modality)} in its media", kinds
            )
            covered[start:end] = numbers[start]
    if batch.media:
        _require_equal(spans, covered, "span_ids", "numbers the media in the order of their tokens")


def _check_layout(batch: PackedFields, name: str, media: PackedMedia) -> None:
    """Boundaries, devices and counts of one modality."""
    for what in ("values", "dst_index", "cu_values", "grid_thw", "time_step"):
        value = getattr(media, what)
        if value is not None:
            _require(
                value.device == batch.tokens.device, f"{name}.{what}", f"is on {batch.tokens.device}", value.device
            )
    host, items, rows = media.cu_values_host, media.num_items, media.values.shape[0]
    _require(
        len(host) == items + 1 and host[0] == 0 and host[-1] == rows and sorted(host) == list(host),
        f"{name}.cu_values",
        f"is N + 1 = {items + 1} entries from 0 to the {rows} rows of values",
        host,
    )
    device = (media.cu_values.dtype, tuple(media.cu_values.tolist()))
    _require(device == (torch.int32, host), f"{name}.cu_values", "is int32 and equal to cu_values_host", device)
    features, counted = media.dst_index.shape[0], sum(media.tokens_host)
    _require(features == counted, f"{name}.dst_index", f"has an entry for each of {counted} tokens", features)
    if media.time_step is not None:
        steps = media.time_step.shape[0]
        _require(steps == items, f"{name}.time_step", f"has an entry for each of {items} items", steps)
    if media.grid_thw is not None:
        sizes = media.grid_thw.prod(1).cpu()
        lengths = torch.tensor(host).diff()
        _require(
            sizes.tolist() == lengths.tolist(), f"{name}.grid_thw", "multiplies to the items' rows", sizes.tolist()
        )
        merged = (sizes // media.merge_size**2).tolist()
        _require(merged == list(media.tokens_host), f"{name}.grid_thw", "merges to the items' tokens", merged)


def _require(holds: bool, name: str, invariant: str, got: Any) -> None:
    if not holds:
        raise ValueError(f"PackedBatch: broken invariant: {name} {invariant}; got {got}")


def _require_equal(got: Tensor, expected: Tensor, name: str, invariant: str) -> None:
    wrong = (got != expected).nonzero()
    if len(wrong):
        at = int(wrong[0])
        _require(False, name, invariant, f"{int(got[at])} at token {at}, expected {int(expected[at])}")
