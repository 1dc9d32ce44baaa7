"""`open_data`: any data source by its name."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from mmkernels.pretrain.data.base import Data, Subset
from mmkernels.pretrain.data.columns import ColumnSource
from mmkernels.pretrain.data.corpus import open_text
from mmkernels.pretrain.data.emoji import open_emoji
from mmkernels.pretrain.data.folder import FolderDataset
from mmkernels.pretrain.data.hub import HubDataset, load_splits
from mmkernels.pretrain.data.languages import open_languages
from mmkernels.pretrain.data.mixed import mix
from mmkernels.pretrain.data.motion import open_motion
from mmkernels.pretrain.data.scenes import open_scenes
from mmkernels.pretrain.data.seeds import is_held_out
from mmkernels.pretrain.data.shares import check_weights
from mmkernels.pretrain.data.spaced import spaced
from mmkernels.pretrain.data.speech import open_speech
from mmkernels.pretrain.data.tables import DELIMITED, TableFormat, find_table
from mmkernels.pretrain.data.unicode import printable
from mmkernels.pretrain.data.webdataset import WebDataset

__all__ = ["EMBEDDED", "NoConceptsError", "held_out_mask", "open_data", "part_names", "reads_table"]

log = logging.getLogger("mmkernels.pretrain.data")


class _Opener(Protocol):
    def __call__(self, fields: Sequence[str] | None = None) -> Data: ...


def _stored(open_it: Callable[[], Data]) -> _Opener:
    """A data set that costs the same whatever is read of it."""
    return lambda fields=None: open_it()


def _computed(open_it: Callable[..., Data]) -> _Opener:
    """A data set that computes the fields that are read, and the labels; others are left out."""

    def opened(fields: Sequence[str] | None = None) -> Data:
        if fields is None:
            return open_it()
        few = open_it(size=1, held_out_size=1).train
        return open_it(fields=[field for field in few.fields if field in fields or field in few.classes])

    return opened


EMBEDDED: dict[str, _Opener] = {
    "emoji": _stored(open_emoji),
    "languages": _stored(open_languages),
    "motion": _computed(open_motion),
    "scenes": _computed(open_scenes),
    "speech": _stored(open_speech),
    "text": _stored(open_text),
}
"""The data sets that come along, by name; each is opened with the fields that are read (None: all)."""


def open_data(
    source: str | Path = "emoji",
    *,
    weights: Sequence[float] | None = None,
    fields: Sequence[str] | None = None,
    labels: Sequence[str] = (),
    partial: bool = False,
    table: TableFormat | None = None,
    resolution: int = 48,
    eval_fraction: float = 0.1,
    held_out_by: Sequence[str] = (),
    max_eval: int = 2000,
    max_broken: float = 0.05,
    cache_bytes: int = 1 << 30,
) -> Data:
    """Open training data and its held-out sets.

    Args:
        source: the name of an embedded data set; a folder with a table, or the table (.jsonl, .csv, .tsv, .parquet);
            tar shards (file, folder, glob); `hf:` and a Hugging Face data set, with `:split` if not all of its splits
            are meant. Those besides `train` are held-out sets. Several of them with `::` in between are mixed: see
            `Mixed`. Folders and tables may be marked by `folder:`, shards by `webdataset:`.
        weights: of several, the share of the training samples that comes from each; None: by size.
        fields: those that are read; None: all that the source is known to have. Of several, each may lack some.
        labels: further fields of your own data, whose values are classes. They are those of the training data.
        partial: your own data may lack some of the fields and labels, as each set of a mixture may.
        table: its separator and columns, if not the defaults.
        resolution: side in pixels at which your own images are kept.
        eval_fraction: fraction of your own concepts held out, chosen by a hash of the caption (without one: of the
            file, or of the first text), so that adding data never moves a sample between the sets.
        held_out_by: of your own data, the fields that tell concepts, in place of those that are read: with the same,
            data read in several ways have the same concepts held out. The data may lack some, but not all of them.
        max_eval: most samples in a held-out set, evenly spaced.
        max_broken: fraction of the samples of a set that may be unreadable.
        cache_bytes: memory for decoded images, clips and recordings, of each set.

    Raises:
        NoConceptsError: one of your own data sets has none of `held_out_by`.
        ValueError: no such data; data without what is read.
    """
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"eval_fraction: expected 0 <= eval_fraction < 1, got {eval_fraction}")
    form = table or TableFormat()
    names = part_names(source, weights)
    if form != TableFormat() and not reads_table(source):
        raise ValueError(f"csv_separator, csv_img_key, csv_caption_key: expected a table to read, got {source}")
    options: dict[str, Any] = {"resolution": resolution, "max_broken": max_broken, "cache_bytes": cache_bytes}
    options |= {"fields": fields, "labels": labels, "partial": partial or len(names) > 1}
    held = _HeldOut(eval_fraction, tuple(held_out_by), max_eval)
    if len(names) == 1:
        return _open(names[0], form, options, held)
    opened: dict[str, Data] = {}
    parts: dict[str, Data] = {}
    for name, shown in zip(names, _shown(names), strict=True):
        same = _place(name)
        if same not in opened:
            opened[same] = _open(name, form, options, held)
        free = (f"{shown} ({n})" if n > 1 else shown for n in count(1))
        parts[next(each for each in free if each not in parts)] = opened[same]
    known = {label for each in opened.values() for label in each.train.classes}
    if lost := [label for label in labels if label not in known]:
        raise ValueError(f"labels: expected columns of {source}, got {', '.join(lost)}, which none of them has")
    return mix(parts, weights)


def reads_table(source: str | Path, delimited: bool = False) -> bool:
    """Whether one of the data sets that a source names is a table, whose columns have names that can be chosen; with
    `delimited`, a .csv or .tsv, whose separator can be."""
    for name in part_names(source):
        kind = _kind(name)
        if kind in ("table", "hub") and not delimited:
            return True
        with suppress(ValueError):  # said when it is opened
            if kind == "table" and find_table(Path(_stripped(name))).suffix.lower() in DELIMITED:
                return True
    return False


def part_names(source: str | Path, weights: Sequence[float] | None = None) -> list[str]:
    """The data sets that a source names, with `::` in between; a `Path` is one.

    Raises:
        ValueError: an empty name, or not a positive weight for each.
    """
    names = [str(source)] if isinstance(source, Path) else source.split("::")
    if not all(names):
        raise ValueError(f"data: expected the names of data sets around '::', got {source!r}")
    if weights is not None:
        if len(weights) != len(names) or len(names) == 1:
            several = f"one for each of {', '.join(names)}"
            expected = several if len(names) > 1 else "several data sets with :: in between"
            raise ValueError(f"data_weights: expected {expected}, got {' '.join(map(str, weights))} for {source}")
        check_weights(weights)
    return names


def places(source: str | Path) -> list[str]:
    """Where the data sets are that a source names: the same, however it spells them."""
    return [_place(name) for name in part_names(source)]


def _place(name: str) -> str:
    """The same for names of the same data set."""
    kind = _kind(name)
    if kind == "hub":
        local = name.removeprefix("hf:")
        return f"hf:{os.path.realpath(local)}" if os.path.exists(local) else name
    if kind == "embedded":
        return name
    path = Path(_stripped(name))
    try:
        return os.path.realpath(find_table(path) if kind == "table" and path.exists() else path)
    except ValueError:  # said when it is opened
        return os.path.realpath(path)


def _shown(names: Sequence[str]) -> list[str]:
    """What the parts of a mixture are called: paths by their last part alone, if no other data set has that name."""
    paths = [_kind(name) in ("table", "shards") for name in names]
    last = [
        os.path.basename(os.path.realpath(_stripped(n))) if path else n for n, path in zip(names, paths, strict=True)
    ]
    places: dict[str, set[str]] = {}
    for name, short in zip(names, last, strict=True):
        places.setdefault(short, set()).add(_place(name))
    return [
        printable(short if len(places[short]) == 1 and not (path and short in EMBEDDED) else name)
        for name, short, path in zip(names, last, paths, strict=True)
    ]


def _kind(name: str) -> str:
    """embedded, hub, shards or table."""
    if name in EMBEDDED:
        return "embedded"
    if name.startswith("hf:"):
        return "hub"
    return "shards" if _is_shards(Path(_stripped(name))) else "table"


def _stripped(name: str) -> str:
    """The path after `folder:` or `webdataset:`."""
    kind, _, path = name.partition(":")
    return path if kind in ("folder", "webdataset") and path else name


class NoConceptsError(ValueError):
    """A data set has none of the fields that tell concepts."""


class _HeldOut(NamedTuple):
    """What is held out of your own data: see `open_data`."""

    fraction: float
    by: tuple[str, ...]
    most: int


def _open(name: str, form: TableFormat, options: dict[str, Any], held: _HeldOut) -> Data:
    """One data set."""
    kind, source, fields = _kind(name), _stripped(name), options["fields"]
    if kind == "embedded":
        return EMBEDDED[name](fields)
    partial: bool = options["partial"]
    wanted = list(dict.fromkeys([*(fields or ()), *options["labels"]]))
    unread = set(held.by) - set(wanted) if fields is not None else set()
    if unread:  # they may lack
        options = {**options, "fields": list(dict.fromkeys([*wanted, *held.by])), "partial": True}

    def keyed(dataset: ColumnSource) -> ColumnSource:
        if held.by:
            _tell_concepts(name, dataset, held.by, unread)
        if unread and not partial:
            dataset.expect_values(name, wanted)
        return dataset

    if kind == "hub":
        if form.separator is not None and not partial:
            raise ValueError(f"csv_separator: expected none for {name}, got {form.separator!r}")
        found = load_splits(name.removeprefix("hf:"))
        sets = {s: keyed(HubDataset(f"{name}: {s}", rows, table=form, **options)) for s, rows in found.items()}
        if len(sets) > 1:
            return _by_split(name, sets, held.most)
        return _by_hash(name, next(iter(sets.values())), held)
    if kind == "shards":
        return _by_hash(source, keyed(WebDataset(source, **options)), held)
    if not Path(source).exists():
        known = ", ".join(EMBEDDED)
        raise ValueError(f"data: expected a folder, or an existing table, or one of {known}; got {printable(source)}")
    return _by_hash(source, keyed(FolderDataset(source, table=form, **options)), held)


def _tell_concepts(name: str, dataset: ColumnSource, by: Sequence[str], unread: Collection[str]) -> None:
    """Let some fields tell concepts, and forget those that are not read. Raises `NoConceptsError`."""
    if labels := [field for field in by if field in dataset.fields and dataset.reading.kind(field) == "label"]:
        raise ValueError(f"held_out_by: expected fields with texts or files, got the label {labels[0]!r}")
    lost = [field for field in by if field not in dataset.fields]
    if len(lost) == len(by):
        got = f"got {', '.join(by)}, of which it reads none with values"
        raise NoConceptsError(f"held_out_by: expected fields of {printable(name)}, {got}")
    if lost:
        log.warning(
            "held_out_by: %s lacks %s; concepts are told by the rest: other samples are held out than where it has all",
            printable(name),
            ", ".join(lost),
        )
    dataset.held_out_by(by, unread)


def _by_hash(name: str, dataset: ColumnSource, held: _HeldOut) -> Data:
    """Some of the concepts of a data set are held out."""
    held_out = held_out_mask(dataset, held.fraction)
    train = Subset(dataset, np.flatnonzero(~held_out))
    if not len(train):
        raise ValueError(f"{name}: expected samples left to train on, got all {len(dataset)} held out")
    rows = np.flatnonzero(held_out)
    rows = rows[spaced(len(rows), held.most)]
    dataset.learn_classes(train.indices)
    train.classes = dataset.classes
    for phrase in dataset.unknown_classes(rows.tolist()):
        log.warning("held_out: %s, which the training data lack", phrase)
    return Data(train, {"held_out": Subset(dataset, rows)} if len(rows) else {})


def _by_split(name: str, sets: Mapping[str, ColumnSource], max_eval: int) -> Data:
    """The split `train`; the others are held out."""
    if "train" not in sets:
        raise ValueError(
            f"{name}: expected a split 'train', got {', '.join(sets)} (name one: {name}:{next(iter(sets))})"
        )
    train, held_out = sets["train"], {}
    for split, dataset in sets.items():
        if split == "train":
            continue
        rows = spaced(len(dataset), max_eval)
        dataset.take_classes(train.classes)
        for phrase in dataset.unknown_classes(rows.tolist()):
            log.warning("%s: %s, which the training data lack", split, phrase)
        held_out[split] = Subset(dataset, rows)
    return Data(train, dict(held_out))


def held_out_mask(dataset: ColumnSource, fraction: float) -> np.ndarray:
    """bool [n]: whether each sample's concept is held out, by the hash of its key."""
    return np.array([is_held_out(key, fraction) for key in dataset.keys], bool)


def _is_shards(path: Path) -> bool:
    """Whether `path` is tar shards: by suffix, or a folder with shards and without a .jsonl or .csv. A .parquet does
    not count: downloaders put one next to each shard.
    """
    if not path.is_dir():
        return path.suffix.lower() == ".tar"
    if not any(path.glob("*.tar")):
        return False
    try:
        return find_table(path).suffix.lower() not in (".jsonl", ".csv")
    except ValueError:
        return True
