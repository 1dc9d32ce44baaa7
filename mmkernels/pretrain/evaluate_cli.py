"""`mmkernels evaluate`: every measure that fits a trained model, beside chance, with intervals."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from tqdm import tqdm

from mmkernels.pretrain.config import Config
from mmkernels.pretrain.data import Data, Mixed, TooManyBrokenError
from mmkernels.pretrain.data.folder import with_labels
from mmkernels.pretrain.data.opening import NoConceptsError, reads_table
from mmkernels.pretrain.evaluate import distinct, evaluate
from mmkernels.pretrain.launch import device_of
from mmkernels.pretrain.load import load_model
from mmkernels.pretrain.measures import Subject, group_labels, measures
from mmkernels.pretrain.metrics import Figure, HeldOut
from mmkernels.pretrain.run_folder import stored_classes, stored_config, write_whole
from mmkernels.pretrain.setup import expect_packages, open_source, read_by

__all__ = ["Evaluation", "evaluate_run", "main"]

_OF_DATA = ("data_weights", "labels", "validate", "train_fraction", "csv_separator", "csv_img_key", "csv_caption_key")
_LIMIT = 2000  # samples of a held-out set


@dataclass(frozen=True)
class Evaluation:
    """Measure a trained model on held-out data."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run, or of an exported model."""
    task: tuple[str, ...] = ()
    """What to measure: retrieval zero-shot alignment probe neighbours predictions classes groups perplexity
    reconstruction ablation captions shots. Default: all that fit."""
    data: str | None = None
    """Another data set than the run's, as for `mmkernels pretrain --data`."""
    split: tuple[str, ...] = ()
    """Held-out sets. Default: all."""
    labels: tuple[str, ...] = ()
    """Label fields to classify by (probe, neighbours, zero-shot), beside the concept. Default: those of the recipe."""
    groups: tuple[str, ...] | None = None
    """Label fields whose classes are compared. Default: those with at most twenty classes."""
    limit: int | None = None
    """Most samples of each held-out set, evenly spaced. Default: 2000, of which a fusion judges fewer pair by pair, see
    metrics.reranked.limit and metrics.matched.limit."""
    json: Path | None = None
    """File of the figures. Default: evaluation.json in the run's folder."""
    device: str = "auto"
    """auto: CUDA if available, else the CPU."""
    threads: int = 0
    """CPU threads; 0: PyTorch's default."""

    def __post_init__(self) -> None:
        for name in ("labels", "groups"):
            if given := getattr(self, name):
                object.__setattr__(self, name, tuple(label for each in given for label in each.split(",") if label))
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit: expected at least 1, got {self.limit}")
        if self.threads < 0:
            raise ValueError(f"threads: expected at least 0, got {self.threads}")


def evaluate_run(options: Evaluation) -> dict[str, list[Figure]]:
    """The figures by split.

    Raises:
        RunFolderError: no run there, or no checkpoint yet.
        ValueError: an option that does not fit the run or its data.
    """
    stored = stored_config(options.run)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = device_of(dataclasses.replace(stored, device=options.device))
    model, collator = load_model(options.run, device)
    data, labels, groups = _opened(options, stored)
    collator.label_fields = tuple(data.train.classes)
    if unknown := [split for split in options.split if split not in data.held_out]:
        raise ValueError(f"split: expected some of {', '.join(data.held_out) or 'none'}, got {', '.join(unknown)}")
    held_out = {
        name: HeldOut(name, source, collator, device, data.train, limit=options.limit or _LIMIT)
        for name, source in data.held_out.items()
        if not options.split or name in options.split
    }
    subject = Subject(stored.wiring(), model, data.train, labels, groups)
    memory: dict[tuple[str, ...], Any] = {}
    found: dict[str, list[Figure]] = {name: [] for name in held_out}
    fitting = measures(subject, options.task, options.limit)
    expect_packages(fitting)
    for metric in tqdm(fitting, unit="measure", leave=False, disable=None):
        for name, figures in evaluate(model, [metric], held_out, memory).items():
            found[name] += figures
    return {name: distinct(figures) for name, figures in found.items()}


def _opened(options: Evaluation, stored: Config) -> tuple[Data, tuple[str, ...], tuple[str, ...]]:
    """(the run's samples with the labels that are asked for, labels to classify by, labels to compare)."""
    limit = options.limit or _LIMIT
    config = dataclasses.replace(stored, data=options.data or stored.data, eval_limit=limit, run=options.run)
    if stored.filter is not None:  # its list belongs to the run's data and labels; what it excused is no news
        config = dataclasses.replace(config, filter=None, max_broken=1.0)
    if options.data not in (None, stored.data):
        config = dataclasses.replace(config, **_as_new(options.data))
    try:
        data = open_source(config)
    except NoConceptsError:  # other data altogether
        config = dataclasses.replace(config, held_out_by=())
        data = open_source(config)
    asked = dict.fromkeys([*options.labels, *(options.groups or ())])
    if more := tuple(name for name in asked if name not in config.labels):
        data = _labelled(config, data, more)
    has = data.train.classes
    for what, names in (("labels", options.labels), ("groups", options.groups or ())):
        if unknown := [name for name in names if name not in has]:
            raise ValueError(f"{what}: expected labels of the data ({', '.join(has) or 'none'}), got {unknown[0]!r}")
    own = [name for name in read_by(config.wiring())[1] if name in has]
    for name, classes in stored_classes(options.run).items():
        if name in own and tuple(has[name]) != classes:
            raise ValueError(
                f"data: expected the classes of {name!r} that the run has learned ({len(classes)}), "
                f"got {len(has[name])} others"
            )
    groups = tuple(group_labels(data.train) if options.groups is None else options.groups)
    return data, options.labels or tuple(own), groups


def _labelled(config: Config, data: Data, labels: tuple[str, ...]) -> Data:
    """The same samples with further labels. A table of images and captions is otherwise read row by row as soon as it
    has another column, and its figures would be of other samples.

    Raises:
        ValueError: rows of one image differ in a label; a mixture whose samples would be others.
    """
    config = dataclasses.replace(config, labels=(*config.labels, *labels))
    found = open_source(config)
    if _names(found) == _names(data):
        return found
    if isinstance(data.train, Mixed):
        raise ValueError(
            f"labels: expected none that change the samples of {config.data}, which has images with all of their "
            f"captions, got {', '.join(labels)}; --data with one of its data sets alone can be measured by them"
        )
    whole: dict[str, Any] = {"validate": False, "train_fraction": 1.0, "eval_fraction": 0.0, "held_out_by": ()}
    rows = open_source(dataclasses.replace(config, **whole, eval_limit=sys.maxsize, max_broken=1.0))
    if config.validate:  # on some of the training samples
        rows = rows._replace(held_out={})
    new = rows.train.classes.keys() - data.train.classes.keys()
    return with_labels(data, rows, [label for label in labels if label in new])


def _names(data: Data) -> dict[str, list[str]]:
    """Of the samples of each split."""
    sources = {"": data.train, **data.held_out}
    return {split: [source.logged_as(i) for i in range(len(source))] for split, source in sources.items()}


def _as_new(data: str) -> dict[str, Any]:
    """The settings of a run that say how its own data are read, for other data. These may be a copy of its own at
    another place, so the same concepts are held out."""
    kept = {"csv_img_key", "csv_caption_key"} if reads_table(data) else set()
    kept |= {"csv_separator"} if reads_table(data, delimited=True) else set()
    return {name: getattr(Config, name) for name in _OF_DATA if name not in kept}


def _finite(figure: Figure) -> dict[str, Any]:
    """A figure as JSON, which knows neither NaN nor infinity: null stands for them."""
    odd = (name for name, value in figure.to_dict().items() if isinstance(value, float) and not math.isfinite(value))
    return {**figure.to_dict(), **dict.fromkeys(odd)}


def table(found: Mapping[str, Sequence[Figure]]) -> str:
    """Figures for a terminal."""
    lines: list[str] = []
    for split, figures in found.items():
        lines += ["", split] if lines else [split]
        rows = [(f.name, f.shown() + ("%" if f.percent else ""), f.shown_interval(), f.shown_chance()) for f in figures]
        head = ("", "", "95% interval", "chance")
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(4)]
        for row in [head, *rows]:
            cells = (f"{cell:{'>' if i else '<'}{widths[i]}}" for i, cell in enumerate(row))
            lines.append("  ".join(["", *cells]).rstrip())
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Run `mmkernels evaluate`; returns the exit status."""
    options = tyro.cli(Evaluation, args=list(argv), prog="mmkernels evaluate")
    try:
        found = evaluate_run(options)
    except (ValueError, TooManyBrokenError) as error:
        print(f"mmkernels evaluate: {error}", file=sys.stderr)
        return 1
    if not any(found.values()):
        print("mmkernels evaluate: the data holds nothing out that could be measured", file=sys.stderr)
        return 1
    print(table(found))
    path = options.json or options.run / "evaluation.json"
    figures = {split: [_finite(figure) for figure in each] for split, each in found.items()}
    options_used = json.loads(json.dumps(dataclasses.asdict(options), default=str))
    text = json.dumps({"options": options_used, "figures": figures}, indent=1, ensure_ascii=False, allow_nan=False)
    try:
        write_whole(path, f"{text}\n".encode("utf-8", "backslashreplace"))  # paths need not be UTF-8
    except OSError as error:
        print(f"mmkernels evaluate: json: expected a file that can be written, got {path} ({error})", file=sys.stderr)
        return 1
    print(f"figures: {path}")
    return 0
