"""The loop: schedule, batch, gradient cache, clip, step, log, evaluate, checkpoint."""

from __future__ import annotations

import time

import torch

from mmkernels.pretrain import checkpoint
from mmkernels.pretrain.config import Config
from mmkernels.pretrain.ending import Outcome, reported
from mmkernels.pretrain.evaluate import evaluate
from mmkernels.pretrain.guards import Interrupt, LossWatch, NotFiniteError, StepGuard
from mmkernels.pretrain.journal import Journal, data_warnings
from mmkernels.pretrain.launch import launched
from mmkernels.pretrain.profiling import ProfileWindow
from mmkernels.pretrain.ranks import Ranks
from mmkernels.pretrain.report import write_report
from mmkernels.pretrain.run_folder import RunFolder, begun_before
from mmkernels.pretrain.schedule import total, unreached
from mmkernels.pretrain.setup import open_source, tokenizer_for
from mmkernels.pretrain.trainer import Trainer
from mmkernels.pretrain.warm_start import cautions_of
from mmkernels.pretrain.watch import watching

__all__ = ["Outcome", "train"]


def train(config: Config) -> Outcome:
    """Run one pretraining, or resume it.

    Returns:
        how it ended. After Ctrl-C or SIGTERM, on any rank, the run is saved and can be resumed.

    Raises:
        ValueError: the recipe, its settings and the data do not go together; before the run folder is made.
        RunFolderError: the run folder is in use. DamagedError: it has no whole checkpoint. SaveError: none can be made.
        NotFiniteError: too many losses or gradients were not finite; the state before that step is saved.
        TooManyBrokenError: too many samples cannot be read. Like the former it leaves a report, once the run has begun.
    """
    with launched(config) as (ranks, device), watching(ranks, config.timeout):
        return _train(config, ranks, device)


def _train(config: Config, ranks: Ranks, device: torch.device) -> Outcome:
    config = ranks.of_leader(lambda: begun_before(config))
    interrupt, folder = Interrupt(), ranks.of_leader(lambda: RunFolder(config))
    with data_warnings() as warnings:
        data = ranks.together(lambda: open_source(config))
        tokenizer = ranks.of_leader(lambda: tokenizer_for(config, data, folder))
        if config.resume:
            folder.expect_classes(data.train.classes)
        trainer, guard = Trainer(config, data, tokenizer, device, ranks), StepGuard(config.skip, config.spike)
    saved, cautions = checkpoint.newest_whole(folder.checkpoints, trainer.load, group=trainer.saver.group)
    begun = trainer.warm_start(config.init) if saved is None and config.init is not None else None
    if saved is not None:
        guard.load_state_dict(saved["guard"])
    elif begun is not None:
        cautions = cautions_of(config, begun, data.train.classes)
    # From here on, nothing is wrong with the settings.
    ranks.of_leader(lambda: folder.begin(config, tokenizer.text(), data.train.classes))
    with Journal(folder, config, device, trainer.step, ranks.leads) as journal:
        if begun is not None:
            journal.warm_start(begun)
        parameters = sum(p.numel() for p in trainer.parameters)
        journal.start(len(data.train), parameters, trainer.trainable, trainer.held_out)
        for message in [*warnings, *cautions, *unreached(trainer.recipe, config.steps)]:
            journal.warn(message)
        with reported(write_report, folder, trainer, journal), interrupt.listening(), trainer.saver:
            stopped = _loop(config, trainer, guard, journal, folder, interrupt)
    return Outcome(folder, trainer.step, stopped)


def _loop(
    config: Config, trainer: Trainer, guard: StepGuard, journal: Journal, folder: RunFolder, interrupt: Interrupt
) -> int:
    """The signal that interrupted the run, on any rank: all learn of it after the same step."""
    watch, profiled = LossWatch(), ProfileWindow(config.profile if trainer.ranks.leads else None, folder.path)
    journal.rates = trainer.flops.figures
    saved, several, stop = trainer.step, len(trainer.recipe.objectives) > 1, 0
    while trainer.step < config.steps and not stop:
        profiled.before(trainer.step)
        before, at = trainer.loader.state_dict(), trainer.ranks.at
        trainer.measure()
        at("beginning", trainer.step)
        lr = trainer.begin()

        with journal.waiting_for_data():
            batch = next(trainer.loader)
        batch = batch.to(trainer.device)
        at("computing gradients")
        found = trainer.backward(batch)

        if fault := guard.fault(found.loss, found.norm):
            what = f"{fault}. The batch begins with {', '.join(batch.names[:5])}"
            if not guard.may_skip():
                trainer.undo()
                trainer.loader.load_state_dict(before)
                path = trainer.save(folder.checkpoints, wait=True, guard=guard.state_dict())
                saved_in = f"No weight was updated; the run before this step is saved in {path}"
                raise NotFiniteError(f"after step {trainer.step}: {what}. {saved_in}")
            trainer.skip()
            journal.skipped(trainer.step, f"step {trainer.step}: {what}. Skipped, {guard.skipped} of {config.skip}")
        else:
            chance = total({name: found.weights[name] for name in found.parts}, found.chances) if found.parts else None
            at("updating weights")
            trainer.update()
            of_parts = {f"{name}/loss": value for name, value in found.parts.items()} if several else {}
            of_parts |= {f"{name}/chance": x for name, x in found.chances.items() if several and x is not None}
            figures = {"loss": found.loss, "lr": lr, "grad_norm": found.norm, **of_parts, **trainer.metrics()}
            figures |= found.pace | found.shares | trainer.times.predicted()
            figures |= {} if chance is None else {"chance": chance}
            journal.step(trainer.step, batch, **figures)
            trainer.times.see(journal.seconds)
            said = (watch.see(found.loss, chance) if chance else "", trainer.pace.straggler())
            for warning in (*said, trainer.statistics.warning(), trainer.mixing.warning()):
                if warning:
                    journal.warn(warning)

        stop = int(trainer.ranks.table([interrupt.number]).max())
        if _due(config.eval_every, trainer.step, config.steps):
            _measure(trainer, journal)
        if _due(config.checkpoint_every, trainer.step, config.steps):
            trainer.save(folder.checkpoints, guard=guard.state_dict())
            saved = trainer.step
    if saved != trainer.step:
        trainer.save(folder.checkpoints, guard=guard.state_dict())
    profiled.close()
    return stop


def _measure(trainer: Trainer, journal: Journal) -> None:
    began, metrics = time.perf_counter(), trainer.recipe.metrics
    trainer.ranks.at("evaluating", patient=True)
    with trainer.placed.whole():
        found = evaluate(trainer.trained, metrics, trainer.held_out, ranks=trainer.ranks)
    journal.evaluation(found, time.perf_counter() - began)
    if found and metrics and not any(found.values()):
        names = ", ".join(dict.fromkeys(type(metric).__name__ for metric in metrics))
        journal.warn(f"nothing could be measured: {names} give no figure of {', '.join(found)}")


def _due(every: int, step: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)
