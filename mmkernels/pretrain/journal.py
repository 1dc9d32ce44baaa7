"""The output of a run: a progress bar, `log.jsonl`, TensorBoard.

One JSON object per line; "kind" is start, init, step, eval or warning.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mmkernels.pretrain.batch import Batch
from mmkernels.pretrain.config import Config
from mmkernels.pretrain.data.unicode import printable
from mmkernels.pretrain.environment import environment
from mmkernels.pretrain.metrics import Figure, HeldOut
from mmkernels.pretrain.pace import peak_memory
from mmkernels.pretrain.run_folder import RunFolder
from mmkernels.pretrain.sample_digests import digests_of
from mmkernels.pretrain.warm_start import WarmStart

__all__ = ["Journal", "data_warnings"]

_DATA_LOG = logging.getLogger("mmkernels.pretrain.data")


class Journal(logging.Handler):
    """Open for the whole run; also records the data loader's warnings about broken images. Of several ranks the leading
    one writes and prints.

    Args:
        folder, config, device: of the run.
        step: optimizer steps done. What the log has of later ones is dropped: they run again.
        leads: whether this is the leading rank.

    Attributes:
        seconds: that the last step took, its data included.
        rates: further figures of a step that took so many seconds.
    """

    def __init__(self, folder: RunFolder, config: Config, device: torch.device, step: int, leads: bool = True) -> None:
        super().__init__(logging.WARNING)
        self.device, self.step_now, self.leads = device, step, leads
        damaged = folder.keep_log_until(self.step_now) if leads else []
        log = folder.log if leads else Path(os.devnull)
        self._file = log.open("a", buffering=1, encoding="utf-8")
        self._tensorboard = self._open_tensorboard(folder) if config.tensorboard and leads else None
        shown = {"initial": step, "unit": "step", "dynamic_ncols": True, "disable": None if leads else True}
        self._bar = tqdm(total=config.steps, **shown)
        self._bar_note: dict[str, str] = {}
        self._waited = self.seconds = 0.0
        self.rates: Callable[[float], Mapping[str, float]] = lambda seconds: {}
        self._step_began = time.perf_counter()
        if damaged:
            self.warn(f"{folder.log.name}: left out what was damaged: line {', '.join(map(str, damaged))}")

    def __enter__(self) -> Journal:
        _DATA_LOG.addHandler(self)
        self._propagated, _DATA_LOG.propagate = _DATA_LOG.propagate, False
        return self

    def __exit__(self, *exc: object) -> None:
        _DATA_LOG.removeHandler(self)
        _DATA_LOG.propagate = self._propagated
        self._bar.close()
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def emit(self, record: logging.LogRecord) -> None:
        self.warn(record.getMessage())

    def write(self, kind: str, **fields: Any) -> None:
        self._file.write(json.dumps({"kind": kind, "step": self.step_now, **fields}) + "\n")

    def start(self, samples: int, parameters: int, trainable: Sequence[int], held_out: Mapping[str, HeldOut]) -> None:
        """Log what the run has: training samples, parameters, how many of these learn in each stage, and which samples
        each split holds out."""
        counts = {"samples": samples, "parameters": parameters, "trainable": list(trainable)}
        splits = {split: digests_of(each) for split, each in held_out.items()}
        self.write("start", **counts, held_out=splits, environment=environment(self.device))

    def warm_start(self, found: WarmStart) -> None:
        names = {"loaded": found.loaded, "fresh": found.fresh, "unused": found.unused}
        self.write("init", run=printable(str(found.run)), of_step=found.step, **names)
        self.say(printable(str(found)))

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self.leads:
            tqdm.write(text, file=sys.stderr)

    def warn(self, message: str) -> None:
        self.write("warning", message=message)
        self.say(f"warning: {message}")

    def skipped(self, step: int, message: str) -> None:
        """Log a step that has updated no weight; `step` counts it as done."""
        self.step_now = step
        self.write("warning", message=message, skipped=True)
        self.say(f"warning: {message}")
        self._bar.update()

    def stopped(self, reason: str) -> None:
        """Log why the run stops before its end. It is not printed: the error is."""
        self.write("warning", message=reason, stopped=True)

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        self._step_began = began = time.perf_counter()
        yield
        self._waited = time.perf_counter() - began

    def step(self, step: int, batch: Batch, **figures: float) -> None:
        """Log an optimizer step.

        Args:
            step: steps done.
            batch: of the step.
            figures: loss, lr, grad_norm, and those of the objectives.
        """
        self.step_now = step
        self.seconds = seconds = time.perf_counter() - self._step_began
        found = {
            "samples_per_s": batch.roster.samples / seconds,
            "tokens_per_s": batch.roster.tokens / seconds,
            "tokens": batch.roster.tokens,
            "padding_saved": batch.padding_saved,
            "data_wait": self._waited / seconds,
            "peak_memory": peak_memory(self.device),
            "seconds": seconds,
            **self.rates(seconds),
        }
        self.write("step", **figures, **{name: float(f"{value:.5g}") for name, value in found.items()})
        self._scalars("train", {**figures, **found})
        self._bar_note |= {"loss": f"{figures['loss']:.3f}", "tokens/s": f"{found['tokens_per_s']:.0f}"}
        self._bar.set_postfix(self._bar_note, refresh=False)
        self._bar.update()

    def evaluation(self, found: Mapping[str, Sequence[Figure]], seconds: float) -> None:
        shown = []
        for split, figures in found.items():
            rows = [figure.to_dict() for figure in figures]
            self.write("eval", split=split, figures=rows, seconds=round(seconds, 3))
            self._scalars(f"eval/{split}", {figure.name.replace(" ", "_"): figure.value for figure in figures})
            for figure in (figure for figure in figures if figure.headline):
                self._bar_note[f"{split} {figure.name}"] = figure.shown()
                shown.append(f"{split} {figure.name} {figure.shown()}")
        if shown:
            self.say(f"step {self.step_now}: {', '.join(shown)}")

    def _open_tensorboard(self, folder: RunFolder) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.warn("TensorBoard is not installed, so nothing is logged to it; --no-tensorboard silences this")
            return None
        try:
            return SummaryWriter(str(folder.path / "tensorboard"), purge_step=self.step_now + 1)
        except UnicodeError:  # the locale lacks the characters, or the name has undecodable bytes
            self.warn(
                f"TensorBoard cannot write to {printable(str(folder.path))}: its name is not UTF-8 in this locale"
            )
            return None

    def _scalars(self, group: str, values: Mapping[str, float]) -> None:
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(f"{group}/{name}", value, self.step_now)


@contextmanager
def data_warnings() -> Iterator[list[str]]:
    """What the data logs while it is opened, before there is a journal."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    _DATA_LOG.addHandler(handler)
    propagated, _DATA_LOG.propagate = _DATA_LOG.propagate, False
    try:
        yield messages
    finally:
        _DATA_LOG.removeHandler(handler)
        _DATA_LOG.propagate = propagated
