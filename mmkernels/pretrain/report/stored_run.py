"""A run as its folder tells of it, without its model or its data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, median
from typing import Any

from mmkernels.pretrain import recipes
from mmkernels.pretrain.config import Config, to_dict
from mmkernels.pretrain.metrics import Figure
from mmkernels.pretrain.metrics.caption_scores import SCORES
from mmkernels.pretrain.recipe import Recipe
from mmkernels.pretrain.report.figures import figure_of, newest_by_split
from mmkernels.pretrain.report.held_out import digest, held_out_of
from mmkernels.pretrain.report.page import flat, steps_done
from mmkernels.pretrain.run_folder import (
    EXPORTED,
    RunFolderError,
    kept_files,
    stored_config,
    stored_records,
    stored_wiring,
)

__all__ = ["StoredRun", "named", "stored_run"]

_NEEDED = {"step": {"step", "loss", "seconds", "tokens_per_s", "peak_memory"}, "eval": {"step", "split", "figures"}}
_ASKED = ("normalize", "negatives")  # settings of an objective that say what it must answer
_DRAWN = ("salt", "when", "static", "vocabulary")  # those of a view that say nothing of how much it hides
_DEEP = ("layers", "stem")  # those of an encoder that say nothing of what it cuts an image or a recording into


@dataclass(frozen=True)
class StoredRun:
    """A run, finished or not."""

    name: str  # by which it is told from the others
    path: Path
    config: Config
    wiring: Mapping[str, Any]  # every setting of its recipe
    start: Mapping[str, Any]  # the newest record of a start
    steps: Sequence[Mapping[str, Any]]
    evals: Sequence[Mapping[str, Any]]
    samples: Mapping[str, Any] | None  # split -> those of the newest figures; None: a log of before does not say it
    done: int  # steps, skipped ones included
    skipped: int
    stopped: str  # why, before its end; empty: it has not, or has gone on since, or that was by Ctrl-C

    @cached_property
    def data(self) -> str:
        """What it learns from."""
        if self.config.data is not None:
            return self.config.data
        try:
            return recipes.load(self.config.recipe).data
        except ValueError:  # a recipe's file that is no longer there
            return f"the data of {self.config.recipe}"

    @cached_property
    def recipe(self) -> Recipe | None:
        """None if its file is no longer there, or this version has no such settings."""
        try:
            return self.config.wiring()
        except (ValueError, TypeError):
            return None

    @cached_property
    def held_out(self) -> dict[str, str]:
        """All that decides which held-out samples there are: figures of runs that differ in it are not compared."""
        return held_out_of(self.config, self.data, self.recipe, {record["split"] for record in self.evals})

    def task(self, objective: str, figure: str = "loss") -> str:
        """What an objective learns, in words, with all that the unit of a figure depends on; empty: there is none of
        this name, or it is not known.

        Args:
            objective: its name.
            figure: of the objective, without that name.
        """
        part = None if self.recipe is None else self.recipe.objectives.get(objective)
        if part is None or self.recipe is None:
            return str(self.wiring.get(f"objectives.{objective}.label", ""))
        stream = self.recipe.streams.get(getattr(part, "stream", ""))
        read = "" if stream is None else stream.field or part.stream
        what = " of ".join(filter(None, (type(part).__name__, getattr(part, "label", "") or read)))
        if "R@" in figure:  # among candidates of the metric's own
            return what
        tokens = stream is not None and stream.encoder.reads_text and not figure.startswith(SCORES)
        return ", ".join(filter(None, (what, *self._asked(objective, part), self.tokenizer if tokens else "")))

    def _asked(self, objective: str, part: Any) -> list[str]:
        """How a question to an objective is put: its settings, and the views that also make held-out questions."""
        assert self.recipe is not None, "the part is of it"
        names = ("a", "b") if getattr(part, "negatives", "") == "swapped" else ("stream",)
        streams = [self.recipe.streams.get(getattr(part, name, "")) for name in names]
        own = [f"{name} {getattr(part, name)}" for name in _ASKED if hasattr(part, name)]
        for view in (view for stream in streams if stream is not None for view in stream.views):
            if view.evaluated and (not view.when or objective in view.when):
                values = [f"{name} {value}" for name, value in vars(view).items() if name not in _DRAWN]
                own.append(" ".join([type(view).__name__, *values]))
        if hasattr(part, "normalize") or getattr(part, "target", "") == "features":  # in numbers that an encoder reads
            encoder = self.recipe.streams[part.stream].encoder
            encoder = getattr(encoder, "encoder", encoder)  # within its adapters
            values = [f"{name} {value}" for name, value in vars(encoder).items() if name not in _DEEP]
            own.append(" ".join([type(encoder).__name__, *values]))
        return own

    @cached_property
    def tokenizer(self) -> str:
        """By which it is told from others; empty if it is not there."""
        file = self.path / "tokenizer.json"
        return f"tokenizer {digest(file)}" if file.is_file() else ""

    @cached_property
    def settings(self) -> dict[str, str]:
        """Every setting, and what it ran on."""
        own = {k: v for k, v in to_dict(self.config).items() if k not in ("run", "resume", "parts", "data")}
        own |= {  # each run has its own copy
            setting: f"{name} ({digest(file)})" if file.is_file() else name
            for setting, (name, file) in kept_files(self.config).items()
        }
        environment = {f"environment.{name}": value for name, value in self.start["environment"].items()}
        return flat({**own, "data": self.data, **self.wiring, **environment})

    @cached_property
    def figures(self) -> dict[tuple[str, str, str], Figure]:
        """(split, name, the task of the objective that its name begins with) -> the newest figure."""
        newest = newest_by_split(self.evals)
        rows = [(split, row) for split, record in newest.items() for row in record["figures"]]
        return {(split, row["name"], self.task(*row["name"].split(": ", 1))): figure_of(row) for split, row in rows}

    @cached_property
    def losses(self) -> dict[str, list[tuple[int, float]]]:
        """(step, loss) of each objective; of a single one the log has the loss alone."""
        names = list(dict.fromkeys(key.split(".")[1] for key in self.wiring if key.startswith("objectives.")))
        keys = {name: f"{name}/loss" for name in names} if len(names) > 1 else dict.fromkeys(names, "loss")
        points = {n: [(r["step"], r[key]) for r in self.steps if key in r] for n, key in keys.items()}
        return {name: each for name, each in points.items() if each}

    def summary(self) -> dict[str, str]:
        """What it is and what it cost, in words."""
        config, steps = self.config, self.steps
        left = (
            "" if self.done >= config.steps else f" of {config.steps:,}: {'stopped' if self.stopped else 'unfinished'}"
        )
        found = {
            "recipe": config.title,
            "data": self.data,
            "training samples": f"{self.start['samples']:,}" if "samples" in self.start else "",
            "steps": f"{self.done:,}" + (f" ({self.skipped:,} skipped)" if self.skipped else "") + left,
            "parameters": f"{self.start['parameters'] / 1e6:.2f} M",
        }
        if steps:
            seconds = sum(record["seconds"] for record in steps)
            found |= {
                "minutes": f"{seconds / 60:.1f}",
                "tokens/s, median": f"{median(record['tokens_per_s'] for record in steps):,.0f}",
                "peak memory": f"{max(record['peak_memory'] for record in steps) / 2**20:,.0f} MB",
                "loss, last steps": f"{fmean(record['loss'] for record in steps[-20:]):.3f}",
            }
        at = max((record["step"] for record in self.evals), default=None)
        return {**found, "evaluated": "never" if at is None else f"at step {at:,}"}


def stored_run(folder: Path, name: str) -> StoredRun:
    """Read a run.

    Args:
        folder: of the run.
        name: by which it is told from the others.

    Raises:
        RunFolderError: no run, one that has not begun, or one whose settings or log are damaged.
    """
    if not (folder / "config.json").is_file():
        raise RunFolderError(f"{folder}: expected the folder of a run, got {_what(folder)}")
    config, wiring = stored_config(folder), stored_wiring(folder)
    log = stored_records(folder)
    starts = [r for r in log if r.get("kind") == "start" and {"environment", "parameters"} <= r.keys()]
    if not starts and (folder / EXPORTED).is_file():
        raise RunFolderError(f"{folder}: expected the folder of a run, got an exported model, which has no log")
    if not starts:
        raise RunFolderError(f"{folder}: expected a run that has begun, got one whose log.jsonl has no start record")
    records = {kind: [r for r in log if r.get("kind") == kind] for kind in _NEEDED}
    for kind, needed in _NEEDED.items():
        if odd := next((r for r in records[kind] if not needed <= r.keys()), None):
            lacks = ", ".join(sorted(needed - odd.keys()))
            raise RunFolderError(f"{folder}/log.jsonl: expected {kind} records with {lacks}, got {odd}")
    since = log[max(i for i, record in enumerate(log) if record is starts[-1]) :]
    stopped = next((r["message"] for r in since if r.get("stopped")), "")
    skipped = sum(1 for record in log if record.get("skipped"))
    ends = (steps_done(log), skipped, stopped)
    return StoredRun(
        name, folder, config, wiring, starts[-1], records["step"], records["eval"], _measured_on(log), *ends
    )


def _measured_on(log: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The held-out samples as they were when the newest figures were measured: a resumed run may find others."""
    last = max((i for i, record in enumerate(log) if record.get("kind") == "eval"), default=len(log))
    starts = [record for record in log[:last] if record.get("kind") == "start"]
    return starts[-1].get("held_out") if starts else None


def _what(folder: Path) -> str:
    if not folder.exists():
        return "nothing there"
    return "a folder without config.json" if folder.is_dir() else "a file"


def named(folders: Sequence[Path]) -> dict[str, Path]:
    """The folders by the shortest ends of their paths that tell them apart. Raise ValueError if one is there twice."""
    whole = [folder.resolve() for folder in folders]
    if twice := next((path for i, path in enumerate(whole) if path in whole[:i]), None):
        raise ValueError(f"RUN: expected different runs, got {twice} twice")
    for depth in range(1, max((len(path.parts) for path in whole), default=0) + 1):
        names = ["/".join(path.parts[-depth:]) for path in whole]
        if len(set(names)) == len(names):
            return dict(zip(names, folders, strict=True))
    return {str(path): folder for path, folder in zip(whole, folders, strict=True)}
