"""The state of a run, as in a checkpoint: weights, twins, optimizer, data cursor."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmkernels import GradCache, received_bytes
from mmkernels.pretrain import checkpoint
from mmkernels.pretrain.ahead import Ahead
from mmkernels.pretrain.batch import Batch
from mmkernels.pretrain.config import Config
from mmkernels.pretrain.data import Collator, Data, Dealer, TrainLoader
from mmkernels.pretrain.data_mixing import DataMixing
from mmkernels.pretrain.drawing import sampler_of
from mmkernels.pretrain.flops import Flops
from mmkernels.pretrain.layers import Block
from mmkernels.pretrain.metrics import HeldOut
from mmkernels.pretrain.mixing import Taught
from mmkernels.pretrain.model import Model
from mmkernels.pretrain.objective_weights import ObjectiveWeights
from mmkernels.pretrain.pace import Pace
from mmkernels.pretrain.placement import placed
from mmkernels.pretrain.ranks import ALONE, Ranks
from mmkernels.pretrain.recipe import Facts, Stage
from mmkernels.pretrain.schedule import (
    check_stages,
    freeze,
    had_steps,
    learning,
    learning_rate,
    reached,
    rest,
    stage_at,
    step_seed,
)
from mmkernels.pretrain.setup import documents
from mmkernels.pretrain.state import Twin, Twins
from mmkernels.pretrain.statistics import Statistics
from mmkernels.pretrain.step_time import StepTime, work_of
from mmkernels.pretrain.tokenizer import TextTokenizer
from mmkernels.pretrain.warm_start import WarmStart, warm_start
from mmkernels.pretrain.workload import workload

__all__ = ["Outcome", "Trainer", "facts_of"]


class Outcome(NamedTuple):
    """What a step has come to on all ranks, before the weights are updated."""

    loss: float
    parts: dict[str, float]  # the loss of each objective to which the batch had something to say
    chances: dict[str, float | None]  # of each of these, that of a guess
    norm: float  # of the gradient, before it was clipped
    pace: dict[str, float]  # of several ranks
    weights: dict[str, float]  # of the objectives in use
    shares: dict[str, float]  # NAME/weight of each before one is drawn, NAME/share of data sets, where they change


class Trainer:
    """Model, optimizer and loader of a run, at one step.

    Args:
        config: the run's.
        data: of the run.
        tokenizer: of the run.
        device: of the model.
        ranks: who train it together.
    """

    def __init__(
        self, config: Config, data: Data, tokenizer: TextTokenizer, device: torch.device, ranks: Ranks = ALONE
    ) -> None:
        torch.manual_seed(config.seed)
        self.config, self.device, self.ranks, self.step = config, device, ranks, 0
        self.pace, self.times = Pace(device), StepTime()
        self._stage: Stage | None = None
        self._probes: dict[tuple[str, frozenset[str]], Batch] = {}
        self.recipe = config.wiring()
        self.weights = ObjectiveWeights(self.recipe, config.seed, config.workers)
        self.mixing = DataMixing(config, self.recipe, data.train, ranks)
        self.model = Model(self.recipe, facts_of(config, data, tokenizer)).to(device)
        check_stages(self.recipe, self.model)
        for name, stream in self.recipe.streams.items():  # what is made once, of the training texts
            encoder: Any = self.model.encoder(name).encoder
            if hasattr(encoder, "learn") and not stream.tied:
                encoder.learn(documents(data.train, stream.field or name), tokenizer)
        read = {self.model.owner[name] for name in self.model.taught}
        decays = {name: s.teacher.decay for name, s in self.recipe.streams.items() if s.teacher and name in read}
        self.twins = Twins(self.model.streams, decays)  # type: ignore[arg-type]
        self.average = Twin(self.model, config.ema) if config.ema else None
        self.carried = nn.ModuleDict({"model": self.model, "twins": self.twins})
        if self.average is not None:
            self.carried["average"] = self.average
        followers = [twin.module for twin in (*self.twins.of.values(), *([self.average] if self.average else []))]
        self.statistics = Statistics(self.model, followers, ranks)
        self.placed = placed(self.model, ranks, config, device, followers)
        self.ahead = Ahead(self.model, ranks, device)
        low = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        self.flops = Flops(device, low, ranks, self.model.streams.values(), countable=not config.compile)
        self.parameters = list(self.model.parameters())
        self.optimizer = self._adamw()
        self.saver = checkpoint.Saver(config.keep_checkpoints, ranks.group)
        if config.compile:
            for block in (module for module in self.model.modules() if isinstance(module, Block)):
                block.compile(dynamic=True)
        classes = tuple(data.train.classes)
        self.collator = Collator(self.recipe.streams, tokenizer, classes, seed=config.seed, without=config.without)
        self.loader = TrainLoader(
            data.train,
            sampler_of(config, self.recipe, data.train, self.collator, ranks, self.mixing.shares_at),
            self.collator,
            dealer=None
            if ranks.group is None
            else Dealer(data.train, self.collator, ranks, partial(workload, self.recipe)),
            workers=config.workers,
            pin=device.type == "cuda",
            in_use=self.weights.in_use,
        )
        self.held_out = {
            name: HeldOut(name, source, self.collator, device, data.train, limit=config.eval_limit)
            for name, source in data.held_out.items()
        }

    def _adamw(self) -> torch.optim.Optimizer:
        config, decayed = self.config, [p for p in self.parameters if p.ndim > 1]
        others = [p for p in self.parameters if p.ndim <= 1]
        groups = [(config.weight_decay, decayed), *((0.0, group) for group in self.placed.groups(others))]
        options = [{"params": group, "weight_decay": decay} for decay, group in groups]
        return torch.optim.AdamW(options, lr=config.lr, betas=(0.9, config.beta2), fused=True)

    @property
    def trained(self) -> Model:
        """The model to evaluate: the average, if there is one."""
        return self.model if self.average is None else self.average.module  # type: ignore[return-value]

    @property
    def learned(self) -> set[str]:
        """The objectives that have learned: in this run so far, or perhaps in the one whose weights it began with."""
        return set(self.recipe.objectives) if self.config.init else had_steps(self.recipe, self.step)

    @property
    def trainable(self) -> list[int]:
        """The number of parameters that learn in each stage that the run gets to."""
        sizes = {name: parameter.numel() for name, parameter in self.model.named_parameters()}
        return [
            sum(sizes[name] for name in learning(self.model, stage))
            for stage in reached(self.recipe, self.config.steps)
        ]

    def warm_start(self, run: Path) -> WarmStart:
        """Begin with the weights of another run; twins and average, too. Raises as `warm_start` does."""
        found = warm_start(self.model, run, self.config.fresh, self.ranks)
        for name, twin in self.twins.of.items():
            twin.module.load_state_dict(self.model.streams[name].state_dict())
        if self.average is not None:
            self.average.module.load_state_dict(self.model.state_dict())
        return found

    def begin(self) -> float:
        """Set what holds at this step: what learns, how deep the fusion is, the learning rate, which is returned."""
        config, stage = self.config, stage_at(self.recipe, self.step)
        if stage is not self._stage:
            freeze(self.model, stage)
            rest(self.model)
            self._deepen(stage)
            self.placed.learn_others()
            encoders = self.placed.encoders(self.model.encoders())
            self._chunk = config.chunk if stage.chunk is None else stage.chunk
            self._cache = GradCache(encoders, self.model.loss, chunk_size=self._chunk, group=self.ranks.group)
            self._stage = stage
        lr = stage.lr_scale * learning_rate(config.lr, config.warmup, config.steps, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.statistics.keep()
        return lr

    def _deepen(self, stage: Stage) -> None:
        for model in (self.model, self.trained):
            if model.fusion is not None:
                model.fusion.depth = stage.fusion_depth

    def backward(self, batch: Batch) -> Outcome:
        """Gradients of a batch, clipped."""
        config = self.config
        weights = self.weights.begin(self.step)
        torch.manual_seed(step_seed(config.seed, self.step, self.ranks.rank))
        kind, work = self._kind(weights, batch), work_of(self.recipe, batch, self.ranks.size)
        before = received_bytes() + self.ranks.received
        self.pace.mark()
        with (
            self.flops.step(kind, sum(work)),
            self.placed.step(),
            self._autocast(),
        ):
            teacher = self._teachers(batch)
            self._cache.on_embedded = self.ahead.of(batch, weights)
            loss_fn = self.weights.measuring(self.model.loss(batch, weights, self._chunk, teacher))
            self._cache.loss_fn = self._marked(loss_fn)
            loss, parts = self._cache(*(batch[name] for name in self.model.encoded))
        norm = self.placed.clip(self.parameters, config.clip_grad)
        received = received_bytes() + self.ranks.received - before + self.placed.traffic()
        values = [loss.item(), norm.item()]  # from here on the device is done
        pace = self.pace.numbers(self.loader.waited, self.loader.waited_for_peers, received)
        self.times.begin(kind, max(work))
        return self._of_all(batch, weights, [*values, *pace], parts)

    def _kind(self, weights: Mapping[str, float], batch: Batch) -> str:
        """What steps have in common that need flop and seconds in proportion to their work."""
        names = [f"stage {self.recipe.stages.index(stage_at(self.recipe, self.step))}", *weights]
        names += ["several chunks"] if max(batch.roster.counts) > self._chunk else []
        names += ["gradients measured"] if self.weights.measures else []
        return ", ".join(names)

    def _marked(self, loss: Callable[..., Any]) -> Callable[..., Any]:
        """Its first exchange with other ranks is in the loss."""

        def of_rows(*rows: Tensor) -> Any:
            self.pace.mark()
            self.flops.losing()
            return loss(*rows)

        return of_rows

    def _of_all(self, batch: Batch, weights: dict[str, float], mine: list[float], parts: dict[str, Tensor]) -> Outcome:
        """The means over the ranks, whose losses are parts of those of the batch, its chances, and the ranks' pace."""
        first, squares = len(mine), self.weights.squares
        for name in weights:
            mine += [float(parts[name]) if name in parts else 0.0, name in parts, squares.get(name, 0.0)]
        table = self.ranks.table(mine)
        (loss, norm), rest = table[:, :2].mean(0).tolist(), table[:, first:].reshape(len(table), -1, 3)
        told = {name: rest[:, i] for i, name in enumerate(weights) if rest[:, i, 1].any()}
        losses = {name: float(each[:, 0].sum() / each[:, 1].sum()) for name, each in told.items()}
        chances = {name: self.model.objectives[name].chance_loss(batch) for name in told}
        everyones = {name: chance for name, chance in chances.items() if name not in self.model.by_token}
        self.weights.tell(losses, everyones, {name: float(e[:, 2].sum()) for name, e in told.items()}, len(table))
        return Outcome(
            loss,
            losses,
            chances,
            norm,
            self.pace.figures(table[:, 2:first]),
            weights,
            self.weights.shown | self.mixing.shown(batch.state.get("mix")),
        )

    def measure(self) -> None:
        """Before a step: where shares of the data follow it, measure what each part teaches. Changes nothing else."""
        if not self.mixing.due(self.step):
            return
        began = time.perf_counter()
        self.begin()
        every = self.mixing.objectives(self.step)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            found = {name: self._taught(name, every) for name in self.mixing.probes}
        self.mixing.see(self.step, found, time.perf_counter() - began)

    def _taught(self, part: str, every: Sequence[tuple[float, dict[str, float]]]) -> Taught:
        """What the samples of a part tell, of (odds, weights of objectives)."""
        losses: dict[str, float] = {}
        expected = 0.0
        for odds, weights in every:
            self.ranks.at(f"measuring {part}")
            batch = self._probe(part, frozenset(weights)).to(self.device)
            weights = {
                name: weight
                for name, weight in weights.items()
                if batch.roster.samples >= getattr(self.model.objectives[name], "least", 1)
            }
            if not weights:
                continue
            torch.manual_seed(step_seed(self.config.seed, 0, self.ranks.rank))
            parts, norm = self._probed(batch, weights)
            self.undo()
            mine = [(float(parts[name].detach()), 1) if name in parts else (0.0, 0) for name in weights]
            table = self.ranks.table([norm, *(number for pair in mine for number in pair)])
            expected += odds * float(table[0, 0])
            for name, (total, ranks) in zip(weights, table[:, 1:].sum(0).reshape(-1, 2).tolist(), strict=True):
                if ranks:
                    compares = name not in self.model.by_token
                    chance = self.model.objectives[name].chance_loss(batch) if compares else None
                    losses[name] = total / ranks / (chance or 1.0)
        return Taught(losses, expected)

    def _probe(self, part: str, used: frozenset[str]) -> Batch:
        """The samples of a part that are measured, on the host."""
        if (part, used) not in self._probes:
            self._probes[part, used] = self.loader.built(self.mixing.probes[part], used)
        return self._probes[part, used]

    def _probed(self, batch: Batch, weights: dict[str, float]) -> tuple[dict[str, Tensor], float]:
        """(The losses of a batch, and the norm of its gradient, which is in place; 0 where it is not wanted.)"""
        gradient, chunk = self.recipe.mixing.kind == "grad_norm", self._chunk
        with self.placed.step() if gradient else self.placed.whole(), self._autocast():
            loss = self.model.loss(batch, weights, chunk, self._teachers(batch))
            if gradient:
                self._cache.loss_fn, self._cache.on_embedded = loss, None
                _, parts = self._cache(*(batch[name] for name in self.model.encoded))
            else:
                with torch.no_grad():
                    encoders = zip(self.model.encoded, self._cache.encoders, strict=True)
                    rows = [
                        torch.cat([encoder(each) for each in batch[name].split(chunk)]) for name, encoder in encoders
                    ]
                    _, parts = loss(*rows)
        return parts, float(self.placed.clip(self.parameters, math.inf)) if gradient else 0.0

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def _teachers(self, batch: Batch) -> dict[str, Tensor]:
        """The momentum twins' embeddings."""
        taught = {name: self.model.owner[name] for name in self.model.taught}
        return self.twins.embeddings(batch.streams, taught, self._chunk)

    def update(self) -> None:
        """Step the optimizer, and what follows the weights."""
        self.optimizer.step()
        for objective in self.model.objectives.values():
            objective.after_step()
        self._forget()
        self.statistics.share()
        self.twins.follow(self.model.streams)  # type: ignore[arg-type]
        if self.average is not None:
            self.average.follow(self.model)
        self.step += 1
        self.weights.count(self.step)
        self.mixing.count()

    def skip(self) -> None:
        """Count a step that was undone."""
        self.undo()
        self.step += 1
        self.weights.count(self.step, skipped=True)
        self.mixing.count(skipped=True)

    def undo(self) -> None:
        """Leave no trace of a backward since `begin`."""
        self.statistics.restore()
        self._forget()

    def _forget(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        for objective in self.model.objectives.values():
            objective.forget()

    def metrics(self) -> dict[str, float]:
        """Values of the objectives' own, such as learned scales."""
        every = self.model.objectives.items()
        return {f"{name}/{key}": value for name, objective in every for key, value in objective.metrics().items()}

    def save(self, folder: Path, *, wait: bool = False, **more: Any) -> Path:
        """Begin to write a checkpoint; with `wait`, or after `saver.wait`, it is on disk. `more` are further values."""
        values = {"step": self.step, "loader": self.loader.state_dict(), **self.weights.state_dict()}
        values |= {"flops": self.flops.state_dict(), **self.mixing.state_dict(), **more}
        path = self.saver.save(folder, self.step, self.carried, self.optimizer, values)
        if wait:
            self.saver.wait()
        return path

    def load(self, path: Path) -> dict[str, Any]:
        """Restore the state that `save` wrote; returns what it kept beside weights and optimizer."""
        values = checkpoint.load_into(path, self.carried, self.optimizer, group=self.saver.group)
        self.step = values["step"]
        self._deepen(stage_at(self.recipe, max(self.step - 1, 0)))  # of the last step, should there be no other
        self.weights.load_state_dict(values)
        self.mixing.load_state_dict(values)
        self.flops.load_state_dict(values.get("flops", {}))
        self.loader.load_state_dict(values["loader"])
        return values


def facts_of(config: Config, data: Data, tokenizer: TextTokenizer) -> Facts:
    """What the parts of a run's recipe are told."""
    recipe = config.wiring()
    classes = {name: tuple(names) for name, names in data.train.classes.items()}
    return Facts(recipe.model, len(tokenizer), classes, recipe.streams, config.seed, config.backend, config.recompute)
