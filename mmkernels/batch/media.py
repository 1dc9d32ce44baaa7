"""Images, clips and recordings: a single item, and all items of one modality in a packed batch."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.checks import integer, wrong_type, wrong_value
from mmkernels.ops.modality import MAX_MODALITIES, Modality

__all__ = ["Media", "PackedMedia"]


@dataclass(frozen=True, eq=False)
class Media:
    """One image, clip or recording of a sample. It is never split.

    Args:
        modality: its id, see `Modality`; not TEXT.
        values: [n, ...], the encoder's input: patches or tubelets at native resolution, audio frames.
        grid_thw: patches in time, height and width, with t * h * w = n; None without a grid, as for audio.
        tokens: number of language-model tokens, one per encoder feature. Default t * h * w divided by merge_size^2 with
            a grid, else n.
        merge_size: patches per side that one token covers.
        time_step: seconds between steps of the grid, transformers' `second_per_grid_ts`: for M-RoPE with time
            (Qwen2.5-VL, Omni). None: one position per step.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
    """

    modality: int
    values: Tensor
    grid_thw: tuple[int, int, int] | None = None
    tokens: int | None = None
    merge_size: int = 1
    time_step: float | None = None

    def __post_init__(self) -> None:
        modality = integer("modality", self.modality, "an integer")
        if not Modality.TEXT < modality < MAX_MODALITIES:
            wrong_value("modality", f"an id in [1, {MAX_MODALITIES})", self.modality)
        if not isinstance(self.modality, Modality):
            object.__setattr__(self, "modality", modality)
        if not isinstance(self.values, Tensor) or self.values.ndim < 1:
            wrong_type("values", "a tensor [n, ...]", self.values)
        rows, merge = self.values.shape[0], integer("merge_size", self.merge_size, "an integer >= 1", at_least=1)
        object.__setattr__(self, "merge_size", merge)
        if self.grid_thw is not None:
            t, h, w = grid = tuple(integer("grid_thw", size, "integers") for size in self.grid_thw)
            if min(grid) < 1 or h % merge or w % merge or t * h * w != rows:
                expected = f"(t, h, w) >= 1 with t * h * w = {rows}, h and w multiples of merge_size {merge}"
                wrong_value("grid_thw", expected, self.grid_thw)
            object.__setattr__(self, "grid_thw", grid)
            merged = t * (h // merge) * (w // merge)
            if self.tokens is not None and self.tokens != merged:
                wrong_value("tokens", f"None or the {merged} of its grid", self.tokens)
            object.__setattr__(self, "tokens", merged)
        elif merge != 1:
            wrong_value("merge_size", "1 without grid_thw (pass tokens instead)", merge)
        elif self.tokens is None:
            object.__setattr__(self, "tokens", rows)
        else:
            object.__setattr__(self, "tokens", integer("tokens", self.tokens, "None or an integer"))
        if self.length < 1:
            wrong_value("tokens", "at least one", self.tokens)
        if self.time_step is not None:
            if not isinstance(self.time_step, Real) or not 0 <= self.time_step < math.inf:
                wrong_value("time_step", "a finite number of seconds >= 0", self.time_step)
            if self.grid_thw is None:
                wrong_value("time_step", "None without grid_thw", self.time_step)
            object.__setattr__(self, "time_step", float(self.time_step))

    @property
    def length(self) -> int:
        """Tokens."""
        assert self.tokens is not None
        return self.tokens


@dataclass(frozen=True, eq=False)
class PackedMedia:
    """All N items of one modality in a batch, in token order.

    Attributes:
        values: [V, ...]: the items' values, concatenated: the encoder's input.
        dst_index: [F] int64: the destination token of each feature, item by item, for `embed_splice`.
        cu_values: [N+1] int32: where each item's values begin: cu_seqlens for the encoder's attention.
        cu_values_host: cu_values as a tuple.
        starts_host: the first token of each item.
        tokens_host: tokens of each item.
        grid_thw: [N, 3] int64, or None.
        merge_size: patches per side that one token covers; the same for all items.
        time_step: [N] float32, seconds between steps of an item's grid, or None.
    """

    values: Tensor
    dst_index: Tensor
    cu_values: Tensor
    cu_values_host: tuple[int, ...]
    starts_host: tuple[int, ...]
    tokens_host: tuple[int, ...]
    grid_thw: Tensor | None = None
    merge_size: int = 1
    time_step: Tensor | None = None

    @classmethod
    def of(cls, items: Sequence[Media], starts: Sequence[int], device: torch.device) -> PackedMedia:
        """Lay out the items of one modality, whose tokens begin at `starts`."""
        first = items[0]
        for i, item in enumerate(items):
            same = item.values.shape[1:] == first.values.shape[1:] and item.values.dtype == first.values.dtype
            if not same or item.values.device != device:
                expected = f"[n, ...] like the first of modality {first.modality}, {list(first.values.shape)} "
                wrong_value(f"media {i}: values", f"{expected}{first.values.dtype} on {device}", item.values)
            if item.merge_size != first.merge_size or (item.grid_thw is None) != (first.grid_thw is None):
                wrong_value(
                    f"media {i}: grid_thw", "a grid and merge_size as the others of its modality", item.grid_thw
                )
            if (item.time_step is None) != (first.time_step is None):
                wrong_value(
                    f"media {i}: time_step", f"one like the first of modality {int(first.modality)}", item.time_step
                )
        ends = (0, *itertools.accumulate(item.values.shape[0] for item in items))
        tokens = tuple(item.length for item in items)
        places = [torch.arange(start, start + n) for start, n in zip(starts, tokens, strict=True)]
        grids = None if first.grid_thw is None else torch.tensor([item.grid_thw for item in items], device=device)
        seconds = None if first.time_step is None else torch.tensor([item.time_step for item in items], device=device)
        return cls(
            values=torch.cat([item.values for item in items]) if len(items) > 1 else first.values,
            dst_index=torch.cat(places).to(device),
            cu_values=torch.tensor(ends, dtype=torch.int32, device=device),
            cu_values_host=ends,
            starts_host=tuple(starts),
            tokens_host=tokens,
            grid_thw=grids,
            merge_size=first.merge_size,
            time_step=seconds,
        )

    @property
    def num_items(self) -> int:
        """N."""
        return len(self.starts_host)

    def map(self, function: Callable[[Tensor], Tensor]) -> PackedMedia:
        """A copy with `function` applied to each tensor."""
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changed: dict[str, Any] = {
            name: function(value) for name, value in tensors.items() if isinstance(value, Tensor)
        }
        return dataclasses.replace(self, **changed)

    def between(self, begin: int, end: int) -> PackedMedia | None:
        """The items whose tokens lie in [begin, end), with tokens counted from `begin`; None if there are none."""
        chosen = [i for i, start in enumerate(self.starts_host) if begin <= start < end]
        if not chosen:
            return None
        i, j = chosen[0], chosen[-1] + 1
        first, last = self.cu_values_host[i], self.cu_values_host[j]
        skipped = sum(self.tokens_host[:i])
        return PackedMedia(
            values=self.values[first:last],
            dst_index=self.dst_index[skipped : skipped + sum(self.tokens_host[i:j])] - begin,
            cu_values=self.cu_values[i : j + 1] - first,
            cu_values_host=tuple(value - first for value in self.cu_values_host[i : j + 1]),
            starts_host=tuple(start - begin for start in self.starts_host[i:j]),
            tokens_host=self.tokens_host[i:j],
            grid_thw=None if self.grid_thw is None else self.grid_thw[i:j],
            merge_size=self.merge_size,
            time_step=None if self.time_step is None else self.time_step[i:j],
        )


torch.serialization.add_safe_globals([Media, PackedMedia])
