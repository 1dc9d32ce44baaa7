"""The loop: schedule, batch, gradient cache, clip, step, log, evaluate, checkpoint."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from mmkernels.pretrain import checkpoint
from mmkernels.pretrain.config import Config
from mmkernels.pretrain.ending import reported
from mmkernels.pretrain.evaluate import evaluate
from mmkernels.pretrain.guards import Interrupt, LossWatch, NotFiniteError, StepGuard
from mmkernels.pretrain.journal import Journal, data_warnings
from mmkernels.pretrain.profiling import ProfileWindow
from mmkernels.pretrain.report import write_report
from mmkernels.pretrain.run_folder import RunFolder
from mmkernels.pretrain.schedule import total, unreached, weights_at
from mmkernels.pretrain.setup import open_source, tokenizer_for
from mmkernels.pretrain.trainer import Trainer
from mmkernels.pretrain.warm_start import cautions_of

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
        ValueError: the recipe, its settings and the data do not go together; before the run folder is made.
        RunFolderError: the run folder is in use. DamagedError: it has no whole checkpoint. SaveError: none can be made.
        NotFiniteError: too many losses or gradients were not finite; the state before that step is saved.
        TooManyBrokenError: too many samples cannot be read. Like the former it leaves a report, once the run has begun.
    """
    device = device_of(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    interrupt, folder = Interrupt(), RunFolder(config)
    with data_warnings() as warnings:
        data = open_source(config)
        tokenizer = tokenizer_for(config, data, folder)
        if config.resume:
            folder.expect_classes(data.train.classes)
        trainer, guard = Trainer(config, data, tokenizer, device), StepGuard(config.skip, config.spike)
    saved, cautions = checkpoint.newest_whole(folder.checkpoints, trainer.load, group=trainer.saver.group)
    begun = trainer.warm_start(config.init) if saved is None and config.init is not None else None
    if saved is not None:
        guard.load_state_dict(saved["guard"])
    elif begun is not None:
        cautions = cautions_of(config, begun, data.train.classes)
    folder.begin(config, tokenizer.text(), data.train.classes)  # from here on, nothing is wrong with the settings
    with Journal(folder, config, device, trainer.step) as journal:
        if begun is not None:
            journal.warm_start(begun)
        parameters = sum(p.numel() for p in trainer.parameters)
        journal.start(len(data.train), parameters, trainer.trainable, trainer.held_out)
        for message in [*warnings, *cautions, *unreached(trainer.recipe, config.steps)]:
            journal.warn(message)
        with reported(write_report, folder, trainer, journal), interrupt.listening(), trainer.saver:
            _loop(config, trainer, guard, journal, folder, interrupt)
    return Outcome(folder, trainer.step, bool(interrupt))


def _loop(
    config: Config, trainer: Trainer, guard: StepGuard, journal: Journal, folder: RunFolder, interrupt: Interrupt
) -> None:
    watch, profiled = LossWatch(), ProfileWindow(config.profile, folder.path)
    saved, several = trainer.step, len(trainer.recipe.objectives) > 1
    while trainer.step < config.steps and not interrupt:
        profiled.before(trainer.step)
        cursor = trainer.cursor()
        lr = trainer.begin()

        with journal.waiting_for_data():
            batch = next(trainer.loader)
        batch = batch.to(trainer.device)
        loss, parts, norm = trainer.backward(batch)

        if fault := guard.fault(loss, norm):
            what = f"{fault}. The batch begins with {', '.join(batch.names[:5])}"
            if not guard.may_skip():
                trainer.rewind(cursor)
                path = trainer.save(folder.checkpoints, wait=True, guard=guard.state_dict())
                saved_in = f"No weight was updated; the run before this step is saved in {path}"
                raise NotFiniteError(f"after step {trainer.step}: {what}. {saved_in}")
            trainer.skip()
            journal.skipped(trainer.step, f"step {trainer.step}: {what}. Skipped, {guard.skipped} of {config.skip}")
        else:
            chances = {name: trainer.model.objectives[name].chance_loss(batch) for name in parts}
            weights = weights_at(trainer.recipe, config.seed, trainer.step)
            chance = total({name: weights[name] for name in parts}, chances) if parts else None
            trainer.update()
            of_parts = {f"{name}/loss": value for name, value in parts.items()} if several else {}
            of_parts |= {f"{name}/chance": value for name, value in chances.items() if several and value is not None}
            figures = {"loss": loss, "lr": lr, "grad_norm": norm, **of_parts, **trainer.metrics()}
            figures |= {} if chance is None else {"chance": chance}
            journal.step(trainer.step, batch, **figures)
            if chance and (warning := watch.see(loss, chance)):
                journal.warn(warning)

        if _due(config.eval_every, trainer.step, config.steps):
            _measure(trainer, journal)
        if _due(config.checkpoint_every, trainer.step, config.steps):
            trainer.save(folder.checkpoints, guard=guard.state_dict())
            saved = trainer.step
    if saved != trainer.step:
        trainer.save(folder.checkpoints, guard=guard.state_dict())
    profiled.close()


def _measure(trainer: Trainer, journal: Journal) -> None:
    began, metrics = time.perf_counter(), trainer.recipe.metrics
    found = evaluate(trainer.trained, metrics, trainer.held_out)
    journal.evaluation(found, time.perf_counter() - began)
    if found and metrics and not any(found.values()):
        names = ", ".join(dict.fromkeys(type(metric).__name__ for metric in metrics))
        journal.warn(f"nothing could be measured: {names} give no figure of {', '.join(found)}")


def _due(every: int, step: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def device_of(config: Config) -> torch.device:
    """Raise ValueError if there is none of that name."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.device)
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # the former: PyTorch without CUDA
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device: expected auto, or one that is here, got {config.device} ({reason})") from error
    return device
