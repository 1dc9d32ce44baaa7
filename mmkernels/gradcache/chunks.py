"""Split an encoder's input along its samples: tensors, nested containers, lists, packed batches."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmkernels.ops.checks import integer, wrong_type, wrong_value

__all__ = ["Args", "Ragged", "amount", "split", "tensors"]

_EXPECTED = "a tensor, an array, a list of samples, a dict, a tuple, Args, Ragged, or an object with split(chunk_size)"
_WHOLE = (bool, int, float, complex, str, bytes, np.generic, torch.dtype, torch.device, type(None))


class Args:
    """Several arguments for one encoder: `Args(ids, mask=mask)` makes the call `encoder(ids, mask=mask)`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args
        self.kwargs = kwargs


class Ragged:
    """A varying number of rows per sample; an encoder gets the rows of its chunk as a plain tensor.

    For models whose images are not indexed by the batch: `Args(ids, pixel_values=Ragged(patches, patches_per_sample),
    image_grid_thw=Ragged(grid, images_per_sample))`.

    Args:
        values: [sum(counts), ...], sample after sample.
        counts: rows of each sample: ints, or a 1-D integer tensor (read on the host).

    Raises:
        TypeError, ValueError: a wrong argument, by name.
    """

    def __init__(self, values: Tensor, counts: Sequence[int] | Tensor) -> None:
        if not isinstance(values, Tensor):
            wrong_type("values", "a tensor [rows, ...]", values)
        self.values = values
        each = counts.tolist() if isinstance(counts, Tensor) else counts
        self.counts = [integer("counts", n, "integers") for n in each]
        if any(n < 0 for n in self.counts):
            wrong_value("counts", "numbers >= 0", counts)
        if values.ndim == 0 or sum(self.counts) != len(values):
            wrong_value("counts", f"numbers that add up to the rows of values, {list(values.shape)}", sum(self.counts))

    def chunks(self, size: int) -> list[Tensor]:
        """The rows of every `size` samples."""
        ends = [0, *itertools.accumulate(self.counts)]
        last = len(self.counts)
        return [self.values[ends[i] : ends[min(i + size, last)]] for i in range(0, max(last, 1), size)]


@dataclass(frozen=True)
class _Split:
    chunks: list[Any]
    samples: int | None  # None: only the object's own split knows
    name: str  # of the member that determines it


def split(value: Any, size: int, name: str) -> list[Any]:
    """Cut an input into chunks of `size` samples, the last one shorter.

    Args:
        value: tensors and arrays are cut along dim 0, lists by their entries, `Ragged` by its counts, dicts, tuples and
            `Args` member by member, other objects by their `split(size)`; numbers, strings and 0-dim tensors go to
            every chunk whole.
        size: samples in a chunk.
        name: the input's name in messages.

    Returns:
        at least one chunk.

    Raises:
        TypeError: something in it cannot be split.
        ValueError: its members disagree in the number of samples.
    """
    cut = _split(value, size, name)
    if cut is None or not cut.chunks:
        wrong_type(name, _EXPECTED, value)
    return cut.chunks


def tensors(chunk: Any) -> Iterator[Tensor]:
    """Every tensor reachable in a chunk."""
    if isinstance(chunk, Tensor):
        yield chunk
    elif isinstance(chunk, Args):
        yield from tensors((chunk.args, chunk.kwargs))
    elif isinstance(chunk, (list, tuple, Mapping)):
        for member in chunk.values() if isinstance(chunk, Mapping) else chunk:
            yield from tensors(member)
    elif dataclasses.is_dataclass(chunk) and not isinstance(chunk, type):
        for member in dataclasses.fields(chunk):
            yield from tensors(getattr(chunk, member.name))


def amount(chunk: Any) -> int:
    """The size of a chunk in a unit that activations scale with: tokens if it counts them, else elements."""
    if isinstance(chunk, (Tensor, np.ndarray)):
        return int(chunk.numel() if isinstance(chunk, Tensor) else chunk.size)
    if isinstance(chunk, Args):
        return amount((chunk.args, chunk.kwargs))
    if isinstance(chunk, (list, tuple, Mapping)):
        return sum(amount(member) for member in (chunk.values() if isinstance(chunk, Mapping) else chunk))
    if isinstance(chunk, _WHOLE):
        return 1
    tokens = getattr(chunk, "num_tokens", None)
    if isinstance(tokens, int):
        return tokens
    return len(chunk) if hasattr(chunk, "__len__") else sum(map(Tensor.numel, tensors(chunk))) or 1


def _split(value: Any, size: int, name: str) -> _Split | None:
    """The chunks of a value, or None when it goes to every chunk whole."""
    if isinstance(value, _WHOLE) or (isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0):
        return None
    if isinstance(value, Tensor):
        return _Split(list(value.split(size)), len(value), name)
    if isinstance(value, (list, np.ndarray)):
        return _Split([value[i : i + size] for i in range(0, max(len(value), 1), size)], len(value), name)
    if isinstance(value, Ragged):
        return _Split(value.chunks(size), len(value.counts), name)
    if isinstance(value, Mapping):
        keys = list(value)
        return _split_members(
            [f"{name}[{key!r}]" for key in keys],
            [value[key] for key in keys],
            size,
            lambda members: dict(zip(keys, members, strict=True)),
        )
    if isinstance(value, tuple):
        make = type(value)._make if hasattr(value, "_make") else tuple  # a namedtuple stays one
        return _split_members([f"{name}[{i}]" for i in range(len(value))], list(value), size, make)
    if isinstance(value, Args):
        return _split_members(
            [f"{name}.args", f"{name}.kwargs"],
            [value.args, value.kwargs],
            size,
            lambda members: Args(*members[0], **members[1]),
        )
    if callable(getattr(value, "split", None)):
        return _Split(list(value.split(size)), None, name)
    wrong_type(name, _EXPECTED, value)


def _split_members(names: list[str], members: list[Any], size: int, make: Callable[[list[Any]], Any]) -> _Split | None:
    """The chunks of a container from those of its members, which must agree in samples."""
    cuts = [_split(member, size, name) for name, member in zip(names, members, strict=True)]
    varying = [cut for cut in cuts if cut is not None]
    if not varying:
        return None
    first = next((cut for cut in varying if cut.samples is not None), varying[0])
    for cut in varying:
        if cut.samples is not None and cut.samples != first.samples:
            hint = "(a list has one entry per sample)"
            wrong_value(cut.name, f"{first.samples} samples like {first.name} {hint}", cut.samples)
        if len(cut.chunks) != len(first.chunks):
            wrong_value(cut.name, f"{len(first.chunks)} chunks like {first.name}", len(cut.chunks))
    chunks = [
        make([member if cut is None else cut.chunks[i] for member, cut in zip(members, cuts, strict=True)])
        for i in range(len(first.chunks))
    ]
    return _Split(chunks, first.samples, first.name)
