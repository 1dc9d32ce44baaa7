"""Pack a tokenized data set of the library datasets, as `trl.pack_dataset` does, planned over the whole of it.

    packed, counts = pack_dataset(dataset, 4096, oversize="split", return_counts=True)
    SFTTrainer(model, SFTConfig(packing=False, padding_free=True), train_dataset=packed)

TRL packs each 1000 rows for themselves, and by default cuts off what is too long. Here all rows are planned together,
and what happens to long ones is asked for and counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mmkernels import PackingPlan, plan_packing

__all__ = ["PackCounts", "pack_dataset"]

OVERSIZE = ("error", "drop", "own_pack", "truncate", "split")
SEQ_LENGTHS = "seq_lengths"
_OPTIONS = (  # of Dataset.map
    "batch_size",
    "cache_file_name",
    "desc",
    "keep_in_memory",
    "load_from_cache_file",
    "num_proc",
    "suffix_template",
    "writer_batch_size",
)
_READ = 10_000  # rows whose lengths are read at once

Array = NDArray[np.int64]


class PackCounts(NamedTuple):
    """What became of a data set's rows. `samples` = `empty` + `dropped` + the rows that are in a pack.

    Attributes:
        samples: rows of the data set.
        packs: rows of the result.
        empty: rows without tokens, which are left out.
        dropped: rows longer than seq_length that were left out (`oversize="drop"`).
        truncated: rows of which only the first seq_length tokens were kept (`oversize="truncate"`).
        tokens_cut: tokens that are not in the result: of the rows dropped, and the ends of those truncated.
        split: rows that were cut into pieces, without loss (`oversize="split"`).
        pieces: samples in the packs; a row that was split counts once for each piece.
        own_packs: packs longer than seq_length, of one row each (`oversize="own_pack"`).
    """

    samples: int
    packs: int
    empty: int
    dropped: int
    truncated: int
    tokens_cut: int
    split: int
    pieces: int
    own_packs: int


def pack_dataset(
    dataset: Any,
    seq_length: int,
    *,
    columns: Sequence[str] | None = None,
    strategy: str = "auto",
    oversize: str = "error",
    keep_order: bool = False,
    seed: int = 0,
    return_counts: bool = False,
    **map_options: Any,
) -> Any:
    """Join rows into packs of at most `seq_length` tokens.

    The result has the columns of the data set, each a list per pack, the rows' lists one after another; and
    `seq_lengths`, the length of each: from these TRL's collator makes position_ids that begin again, as the
    padding-free path wants them. Labels are not shifted: a causal model must not be trained to predict a row's first
    token from the row before, which TRL's collator sees to.

    Only the lengths are held in memory. Rows are gathered a batch at a time and written through `Dataset.map`, with its
    cache, whose key contains the plan. The plan scatters rows: where a data set is larger than memory and on a slow
    disk, `strategy="subset_sum"` or "next_fit" read it nearly in order.

    Args:
        dataset: a `datasets.Dataset`, or a `DatasetDict`, whose splits are packed each for itself.
        seq_length: most tokens in a pack.
        columns: those to pack, of equally long lists in each row; the others are left out. None for all, which must
            then be such lists.
        strategy, keep_order, seed: of `plan_packing`.
        oversize: what to do with rows longer than seq_length. "error" raises; "drop" leaves them out; "own_pack" gives
            each a pack of its own, longer than seq_length; "truncate" keeps their first seq_length tokens; "split" cuts
            them into pieces of seq_length tokens and a shorter last one, which are samples of their own.
        return_counts: return also what became of the rows.
        **map_options: of `Dataset.map`: batch_size, num_proc, keep_in_memory, load_from_cache_file, cache_file_name
            (not for a DatasetDict), writer_batch_size, desc, suffix_template.

    Returns:
        the packed data set in the same format; with `return_counts` a pair of it and its `PackCounts`, for a
        DatasetDict a dictionary of them by split.

    Raises:
        TypeError: no data set of these, a column that is not of lists, an option that is not one of `map` above.
        ValueError: a column that is absent; a row whose lists are null or of different lengths, by number; a row that
            is too long, with `oversize="error"`; any other argument out of range.
    """
    unknown = sorted(set(map_options) - set(_OPTIONS))
    if unknown:
        raise TypeError(f"{unknown[0]}: expected an option of Dataset.map among {', '.join(_OPTIONS)}")
    if oversize not in OVERSIZE:
        raise ValueError(f"oversize: expected one of {', '.join(OVERSIZE)}, got {oversize!r}")
    chosen: Any = {"strategy": strategy, "oversize": oversize, "keep_order": keep_order, "seed": seed}
    if isinstance(dataset, datasets.DatasetDict):
        if "cache_file_name" in map_options:
            raise TypeError("cache_file_name: expected to be unset for a DatasetDict, whose splits would overwrite it")
        made = {name: _pack(split, seq_length, columns, chosen, map_options) for name, split in dataset.items()}
        packed: Any = datasets.DatasetDict({name: split for name, (split, _) in made.items()})
        return (packed, {name: counts for name, (_, counts) in made.items()}) if return_counts else packed
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(f"dataset: expected a datasets.Dataset or DatasetDict, got {type(dataset).__name__}")
    packed, counts = _pack(dataset, seq_length, columns, chosen, map_options)
    return (packed, counts) if return_counts else packed


class _Pieces(NamedTuple):
    """What is packed: `length` tokens of a row from `begin` on."""

    row: Array
    begin: Array
    length: Array


def _pack(
    dataset: datasets.Dataset, seq_length: int, columns: Sequence[str] | None, chosen: dict[str, Any], options: Any
) -> tuple[datasets.Dataset, PackCounts]:
    names = _columns(dataset, columns)
    source = dataset.with_format("arrow")
    lengths = _lengths(source, names)
    oversize = chosen["oversize"]
    # The planner checks seq_length too, but not before the rows are cut by it.
    empty_plan = plan_packing(np.zeros(0, np.int64), seq_length, **{**chosen, "oversize": "error"})
    pieces, counts = _cut(lengths, empty_plan.capacity, oversize)
    chosen = {**chosen, "oversize": "own_pack" if oversize == "own_pack" else "error"}
    plan = plan_packing(pieces.length, seq_length, **chosen)
    counts = counts._replace(packs=plan.num_packs, own_packs=len(plan.oversize_packs))
    format_of = dataset.format
    if len(dataset):
        gather = _Gather(source, names, pieces, plan)
        arguments: Any = {"desc": "Packing"} | options | {"batched": True, "with_indices": True}
        packed = source.map(
            gather, remove_columns=source.column_names, new_fingerprint=gather.fingerprint(), **arguments
        )
    else:
        features = {name: dataset.features[name] for name in names}
        features[SEQ_LENGTHS] = datasets.Features.from_arrow_schema(pa.schema([("_", pa.list_(pa.int32()))]))["_"]
        nothing: dict[str, list[Any]] = {name: [] for name in features}
        packed = datasets.Dataset.from_dict(nothing, datasets.Features(features), split=dataset.split)
    shown = [name for name in names if name in format_of["columns"]] + [SEQ_LENGTHS]
    kept = {
        "columns": shown if len(shown) <= len(names) else None,
        "output_all_columns": format_of["output_all_columns"],
    }
    return packed.with_format(format_of["type"], **kept, **format_of["format_kwargs"]), counts


def _columns(dataset: datasets.Dataset, columns: Sequence[str] | None) -> list[str]:
    """The columns to pack: all present, of lists, and none of the name that the result's lengths have."""
    if isinstance(columns, str):
        raise TypeError(f"columns: expected a sequence of names, got {columns!r}")
    names = list(dataset.column_names if columns is None else columns)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"columns: expected at least one column, each once, got {names}")
    schema = dataset.data.schema
    for name in names:
        if name not in dataset.column_names:
            raise ValueError(f"columns: expected among {dataset.column_names}, got {name!r}")
        if name == SEQ_LENGTHS:
            raise ValueError(f"columns: expected no column {name!r}, which the result gets: is it packed already?")
        kind = schema.field(name).type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            given = "" if columns is not None else "; name the columns to pack, if not all, by columns="
            raise TypeError(f"column {name!r}: expected lists of tokens, got {kind}{given}")
    return names


def _lengths(source: datasets.Dataset, names: list[str]) -> Array:
    """[n]: tokens of each row, the same in all columns."""
    found = [np.zeros(0, np.int64)]
    for first in range(0, len(source), _READ):
        table = source[first : first + _READ]
        sizes = [_sizes(table[name], name, first) for name in names]
        for name, each in zip(names[1:], sizes[1:], strict=True):
            at = np.flatnonzero(each != sizes[0])
            if len(at):
                row = int(at[0])
                raise ValueError(
                    f"column {name!r}: expected {sizes[0][row]} entries in row {first + row}, as in column "
                    f"{names[0]!r}, got {each[row]}"
                )
        found.append(sizes[0])
    return np.concatenate(found)


def _sizes(column: pa.ChunkedArray, name: str, first: int) -> Array:
    sizes = pc.list_value_length(column)
    if sizes.null_count:
        row = first + int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise ValueError(f"column {name!r}: expected a list in row {row}, got null")
    return sizes.to_numpy().astype(np.int64)


def _cut(lengths: Array, seq_length: int, oversize: str) -> tuple[_Pieces, PackCounts]:
    """The pieces to pack, and all counts that do not depend on the plan."""
    over = lengths > seq_length
    if oversize == "error" and over.any():
        _refuse(lengths, over, seq_length)
    row = np.flatnonzero((lengths > 0) & ~(over if oversize == "drop" else False))
    length = lengths[row]
    begin = np.zeros_like(row)
    if oversize == "truncate":
        length = np.minimum(length, seq_length)
    elif oversize == "split":
        parts = -(-length // seq_length)
        number = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)  # of each piece in its row
        row, begin = np.repeat(row, parts), number * seq_length
        length = np.minimum(np.repeat(length, parts) - begin, seq_length)
    many = int(over.sum())
    return _Pieces(row, begin, length), PackCounts(
        samples=len(lengths),
        packs=0,
        empty=int((lengths == 0).sum()),
        dropped=many if oversize == "drop" else 0,
        truncated=many if oversize == "truncate" else 0,
        tokens_cut=int(lengths.sum() - length.sum()),
        split=many if oversize == "split" else 0,
        pieces=len(row),
        own_packs=0,
    )


def _refuse(lengths: Array, over: NDArray[np.bool_], seq_length: int) -> NoReturn:
    row = int(np.flatnonzero(over)[0])
    more = f" and {over.sum() - 1} more rows" if over.sum() > 1 else ""
    raise ValueError(
        f"dataset: expected rows of at most seq_length={seq_length} tokens with oversize='error', got {lengths[row]} "
        f"in row {row}{more}"
    )


class _Gather:
    """The function of `Dataset.map`: makes a share of the packs for each batch of rows, whichever these are, so that
    the batches, the processes and the cache are those of the data set."""

    def __init__(self, source: datasets.Dataset, names: list[str], pieces: _Pieces, plan: PackingPlan) -> None:
        self._source, self._names, self._rows = source.select_columns(names), names, len(source)
        items = plan.items
        self._pieces, self._offsets = _Pieces(*(values[items] for values in pieces)), np.array(plan.offsets)

    def fingerprint(self) -> str:
        """Of all that the result depends on."""
        told = f"mmkernels.pack_dataset 1 {self._source._fingerprint} {self._names}".encode()
        return hashlib.sha256(b"".join([told, *map(np.ndarray.tobytes, (*self._pieces, self._offsets))])).hexdigest()[
            :16
        ]

    def __call__(self, batch: pa.Table, numbers: list[int]) -> pa.Table:
        packs = len(self._offsets) - 1
        first, last = (number * packs // self._rows for number in (numbers[0], numbers[-1] + 1))
        offsets = self._offsets[first : last + 1]
        row, begin, length = (values[offsets[0] : offsets[-1]] for values in self._pieces)
        rows, which = np.unique(row, return_inverse=True)
        table = self._source[rows.tolist()]
        tokens = np.concatenate([[0], np.cumsum(length)])
        within = np.arange(tokens[-1]) - np.repeat(tokens[:-1], length)
        joined = [
            _joined(table[name], which, begin, length, within, tokens[offsets - offsets[0]]) for name in self._names
        ]
        samples = pa.ListArray.from_arrays(pa.array(offsets - offsets[0], pa.int32()), pa.array(length, pa.int32()))
        return pa.table([*joined, samples], names=[*self._names, SEQ_LENGTHS])


def _joined(column: pa.ChunkedArray, which: Array, begin: Array, length: Array, within: Array, ends: Array) -> pa.Array:
    """A list for each pack.

    Args:
        column: lists of the rows.
        which, begin, length: [pieces], the row of the column, and the piece of its list.
        within: [tokens], the number of each token in its piece.
        ends: [packs + 1], where each pack's tokens begin.
    """
    lists = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    offsets = lists.offsets.to_numpy()
    index = np.repeat(offsets[which] + begin, length) + within
    return type(lists).from_arrays(pa.array(ends, lists.offsets.type), lists.values.take(pa.array(index)))
