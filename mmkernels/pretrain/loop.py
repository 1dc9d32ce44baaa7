"""The loop: learning rate, batch, gradient cache, clip, step, log, evaluate, checkpoint."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import nn

from mmkernels import GradCache
from mmkernels.pretrain import checkpoint
from mmkernels.pretrain.config import Config
from mmkernels.pretrain.data import Batch, Data, open_data
from mmkernels.pretrain.evaluate import evaluate
from mmkernels.pretrain.guards import Interrupt, LossWatch, NotFiniteError
from mmkernels.pretrain.journal import Journal
from mmkernels.pretrain.profiling import ProfileWindow
from mmkernels.pretrain.report import write_report
from mmkernels.pretrain.run_folder import RunFolder
from mmkernels.pretrain.trainer import Cursor, Trainer, learning_rate

__all__ = ["Outcome", "train"]


@dataclass(frozen=True)
class Outcome:
    """How a run ended. Its figures are in `folder.records()`."""

    folder: RunFolder
    step: int
    interrupted: bool


def train(config: Config) -> Outcome:
    """Run one pretraining, or resume it.

    Returns:
        how it ended. After Ctrl-C the run is saved and can be resumed.

    Raises:
        RunFolderError: the run folder is in use.
        NotFiniteError: the loss or a gradient is not finite; the state before that step is saved.
        TooManyBrokenError: too many samples cannot be read.
    """
    folder, device = RunFolder(config), device_of(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    interrupt = Interrupt()
    with Journal(folder, config, device) as journal:
        data = open_source(config)
        trainer = Trainer(config, data.train, device)
        if saved := checkpoint.latest(folder.checkpoints):
            trainer.load(saved)
        journal.start(samples=len(data.train), parameters=sum(p.numel() for p in trainer.parameters))
        with interrupt.listening():
            _loop(config, trainer, data, journal, folder, interrupt)
        write_report(folder, trainer.model, data, trainer.tokenizer)
    return Outcome(folder, trainer.step, bool(interrupt))


def _loop(
    config: Config, trainer: Trainer, data: Data, journal: Journal, folder: RunFolder, interrupt: Interrupt
) -> None:
    cache = GradCache([trainer.model.image, trainer.model.text], trainer.objective, chunk_size=config.chunk)
    watch, profiled = LossWatch(), ProfileWindow(config.profile, folder.path)
    saved = trainer.step
    while trainer.step < config.steps and not interrupt:
        profiled.before(trainer.step)
        cursor = trainer.cursor()
        lr = learning_rate(config, trainer.step)
        trainer.set_lr(lr)

        with journal.waiting_for_data():
            batch = next(trainer.loader)
        with trainer.autocast():
            loss = cache(batch.images.to(trainer.device), batch.text).item()
        norm = nn.utils.clip_grad_norm_(trainer.parameters, config.clip_grad).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            _stop_before_step(trainer, cursor, folder, batch, loss, norm)

        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)
        trainer.objective.clamp_()
        trainer.step += 1

        tokens = trainer.model.image.tokens * len(batch.images) + len(batch.text.word_ids)
        metrics = {"loss": loss, "lr": lr, "grad_norm": norm, **trainer.objective.metrics()}
        journal.step(trainer.step, samples=len(batch.images), tokens=tokens, **metrics)
        if warning := watch.see(loss, trainer.objective.chance_loss(len(batch.images))):
            journal.warn(warning)

        if _due(config.eval_every, trainer.step, config.steps):
            began = time.perf_counter()
            recalls = evaluate(trainer.model, data.evals, trainer.tokenizer)
            journal.evaluation(recalls, time.perf_counter() - began)
        if _due(config.checkpoint_every, trainer.step, config.steps):
            trainer.save(folder.checkpoints)
            saved = trainer.step
    if saved != trainer.step:
        trainer.save(folder.checkpoints)
    profiled.close()


def _due(every: int, step: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _stop_before_step(
    trainer: Trainer, cursor: Cursor, folder: RunFolder, batch: Batch, loss: float, norm: float
) -> NoReturn:
    """Nothing was updated yet: save the run as it was before this batch, and name the batch."""
    trainer.rewind(cursor)
    path = trainer.save(folder.checkpoints)
    raise NotFiniteError(
        f"step {trainer.step}: the loss is {loss} and the gradient norm {norm}. No weight was updated; the run "
        f"before this step is saved in {path}. The batch begins with {', '.join(batch.names[:5])}"
    )


def device_of(config: Config) -> torch.device:
    if config.device != "auto":
        return torch.device(config.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def open_source(config: Config) -> Data:
    """The data that `config.data` names."""
    kind, _, path = config.data.partition(":")
    source = path if kind in ("folder", "webdataset") and path else config.data
    return open_data(
        source,
        table=config.table,
        resolution=max(48, config.model.image_size),
        eval_fraction=config.eval_fraction,
        max_broken=config.max_broken,
    )
