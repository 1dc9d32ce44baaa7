"""The state of a run, as in a checkpoint: weights, twins, optimizer, data cursor, random state."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from mmkernels import GradCache
from mmkernels.pretrain import checkpoint
from mmkernels.pretrain.batch import Batch
from mmkernels.pretrain.config import Config
from mmkernels.pretrain.data import BatchSampler, Collator, Data, TokenSampler, TrainLoader
from mmkernels.pretrain.layers import Block
from mmkernels.pretrain.metrics import HeldOut
from mmkernels.pretrain.model import Model
from mmkernels.pretrain.recipe import Facts, Stage
from mmkernels.pretrain.schedule import (
    check_stages,
    freeze,
    had_steps,
    in_use,
    learning,
    learning_rate,
    reached,
    rest,
    stage_at,
    weights_at,
)
from mmkernels.pretrain.setup import documents
from mmkernels.pretrain.state import Twin, Twins
from mmkernels.pretrain.tokenizer import TextTokenizer
from mmkernels.pretrain.warm_start import WarmStart, warm_start

__all__ = ["Cursor", "Trainer", "facts_of"]


class Cursor(NamedTuple):
    """The state that a step advances before it updates weights and optimizer."""

    loader: dict[str, Any]
    random: dict[str, Any]


class Trainer:
    """Model, optimizer and loader of a run, at one step.

    Args:
        config: the run's.
        data: of the run.
        tokenizer: of the run.
        device: of the model.
    """

    def __init__(self, config: Config, data: Data, tokenizer: TextTokenizer, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        self.config, self.device, self.step = config, device, 0
        self._stage: Stage | None = None
        self.recipe = config.wiring()
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
        self.parameters = list(self.model.parameters())
        decayed = [p for p in self.parameters if p.ndim > 1]
        others = [p for p in self.parameters if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=config.lr,
            betas=(0.9, config.beta2),
            fused=True,
        )
        self.saver = checkpoint.Saver(config.keep_checkpoints)
        if config.compile:
            for block in (module for module in self.model.modules() if isinstance(module, Block)):
                block.compile(dynamic=True)
        self.cache = GradCache(self.model.encoders(), self.model.loss, chunk_size=config.chunk)
        self.collator = Collator(
            self.recipe.streams,
            tokenizer,
            tuple(data.train.classes),
            seed=config.seed,
            in_use=partial(in_use, self.recipe, config.seed),  # picklable, for workers
            without=config.without,
        )
        self.loader = TrainLoader(
            data.train,
            self._sampler(data),
            self.collator,
            workers=config.workers,
            pin=device.type == "cuda",
        )
        self.held_out = {
            name: HeldOut(name, source, self.collator, device, data.train, limit=config.eval_limit)
            for name, source in data.held_out.items()
        }

    def _sampler(self, data: Data) -> BatchSampler | TokenSampler:
        config, source = self.config, data.train
        if config.tokens is not None:
            lengths = self.collator.lengths(source)
            return TokenSampler(
                lengths, config.tokens, max_samples=config.batch, seed=config.seed, shares=source.shares
            )
        distinct = any(getattr(part, "by_concept", False) for part in self.recipe.objectives.values())
        concepts = source.concepts if distinct else np.arange(len(source))
        return BatchSampler(concepts, config.batch, config.seed, source.shares)

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
        found = warm_start(self.model, run, self.config.fresh)
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
            self._stage = stage
        lr = stage.lr_scale * learning_rate(config.lr, config.warmup, config.steps, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _deepen(self, stage: Stage) -> None:
        for model in (self.model, self.trained):
            if model.fusion is not None:
                model.fusion.depth = stage.fusion_depth

    def backward(self, batch: Batch) -> tuple[float, dict[str, float], float]:
        """Gradients of a batch, clipped: (loss, that of each objective to which the batch has something to say, norm
        before clipping)."""
        config = self.config
        weights = weights_at(self.recipe, config.seed, self.step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            taught = {name: self.model.owner[name] for name in self.model.taught}
            teacher = self.twins.embeddings(batch.streams, taught, config.chunk)
            self.cache.loss_fn = self.model.loss(batch, weights, config.chunk, teacher)
            loss, parts = self.cache(*(batch[name] for name in self.model.encoded))
        norm = nn.utils.clip_grad_norm_(self.parameters, config.clip_grad)
        return loss.item(), {name: part.item() for name, part in parts.items()}, norm.item()

    def update(self) -> None:
        """Step the optimizer, and what follows the weights."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for objective in self.model.objectives.values():
            objective.after_step()
        self.twins.follow(self.model.streams)  # type: ignore[arg-type]
        if self.average is not None:
            self.average.follow(self.model)
        self.step += 1

    def skip(self) -> None:
        """Leave this step's gradients unused."""
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def metrics(self) -> dict[str, float]:
        """Values of the objectives' own, such as learned scales."""
        every = self.model.objectives.items()
        return {f"{name}/{key}": value for name, objective in every for key, value in objective.metrics().items()}

    def cursor(self) -> Cursor:
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        return Cursor(self.loader.state_dict(), random)

    def rewind(self, cursor: Cursor) -> None:
        """Return to a cursor; weights and optimizer stay."""
        self.loader.load_state_dict(cursor.loader)
        torch.set_rng_state(cursor.random["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(cursor.random["cuda"], self.device)

    def save(self, folder: Path, *, wait: bool = False, **more: Any) -> Path:
        """Begin to write a checkpoint; with `wait`, or after `saver.wait`, it is on disk. `more` are further values."""
        values = {"step": self.step, **self.cursor()._asdict(), **more}
        path = self.saver.save(folder, self.step, self.carried, self.optimizer, values)
        if wait:
            self.saver.wait()
        return path

    def load(self, path: Path) -> dict[str, Any]:
        """Restore the state that `save` wrote; returns what it kept beside weights and optimizer."""
        values = checkpoint.load_into(path, self.carried, self.optimizer, group=self.saver.group)
        self.step = values["step"]
        self._deepen(stage_at(self.recipe, max(self.step - 1, 0)))  # of the last step, should there be no other
        self.rewind(Cursor(values["loader"], values["random"]))
        return values


def facts_of(config: Config, data: Data, tokenizer: TextTokenizer) -> Facts:
    """What the parts of a run's recipe are told."""
    recipe = config.wiring()
    classes = {name: tuple(names) for name, names in data.train.classes.items()}
    return Facts(recipe.model, len(tokenizer), classes, recipe.streams, config.seed, config.backend, config.recompute)
