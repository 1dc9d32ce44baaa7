"""The state of a run, as in a checkpoint: weights, optimizer, data cursor, random state."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from mmkernels.pretrain import checkpoint
from mmkernels.pretrain.config import Config
from mmkernels.pretrain.data import Tokenizer, TrainLoader
from mmkernels.pretrain.data.base import Source
from mmkernels.pretrain.model import DualEncoder
from mmkernels.pretrain.recipes import recipe

__all__ = ["Cursor", "Trainer", "learning_rate"]


class Cursor(NamedTuple):
    """The state that a step advances before it updates weights and optimizer."""

    loader: dict[str, Any]
    random: dict[str, Any]


class Trainer:
    """Model, objective, optimizer and loader of a run, at one step.

    Args:
        config: the run's.
        dataset: the training data.
        device: of the model.
    """

    def __init__(self, config: Config, dataset: Source, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        self.config, self.device, self.step = config, device, 0
        self.model = DualEncoder(config.model, config.backend).to(device)
        self.objective = recipe(config.recipe).objective(config).to(device)
        self.trained = nn.ModuleDict({"model": self.model, "objective": self.objective})
        self.parameters = list(self.trained.parameters())
        decayed = [p for p in self.parameters if p.ndim > 1]
        others = [p for p in self.parameters if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=config.lr,
            betas=(0.9, config.beta2),
            fused=True,
        )
        self.tokenizer = tokenizer_for(config)
        self.loader = TrainLoader(
            dataset,
            batch_size=config.batch,
            image_size=config.model.image_size,
            tokenizer=self.tokenizer,
            augment=config.augment,
            seed=config.seed,
        )

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

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

    def save(self, folder: Path) -> Path:
        weights = {name: tensor.contiguous() for name, tensor in self.trained.state_dict().items()}
        training = {"step": self.step, "optimizer": self.optimizer.state_dict(), **self.cursor()._asdict()}
        return checkpoint.save(folder, self.step, weights, training, keep=self.config.keep_checkpoints)

    def load(self, path: Path) -> None:
        """Restore the state that `save` wrote."""
        weights, training = checkpoint.load(path, self.device)
        self.trained.load_state_dict(weights)
        self.optimizer.load_state_dict(training["optimizer"])
        self.step = training["step"]
        self.rewind(Cursor(training["loader"], training["random"]))


def tokenizer_for(config: Config) -> Tokenizer:
    model = config.model
    return Tokenizer(word_buckets=model.word_buckets, gram_buckets=model.gram_buckets, max_words=model.max_words)


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up, then cosine decay to zero at the last step. Depends on the step alone."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
