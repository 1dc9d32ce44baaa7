"""A recipe on a few samples: collated, built, and its loss and gradients for a size of chunk."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmkernels import GradCache, PackedBatch
from mmkernels.pretrain.batch import Batch
from mmkernels.pretrain.data.base import BrokenLog, Sample, Source
from mmkernels.pretrain.data.collate import Collator
from mmkernels.pretrain.metrics import HeldOut
from mmkernels.pretrain.model import Model
from mmkernels.pretrain.recipe import Facts, Recipe, Shape
from mmkernels.pretrain.tokenizer import TextTokenizer

__all__ = ["Samples", "built", "collated", "collator", "doubled", "gradients", "held_out", "recipe"]

TOKENIZER = TextTokenizer.train(["a red cat", "a blue dog"], 300)


class Samples(Source):
    """Samples in memory."""

    def __init__(
        self,
        values: Sequence[Mapping[str, Any]],
        concepts: Sequence[int] | None = None,
        classes: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        self.values, self.classes = list(values), classes or {}
        self.fields = tuple(sorted({field for value in values for field in value}))
        self.concepts = np.array(range(len(values)) if concepts is None else concepts, np.int64)
        self.broken = BrokenLog(len(values), 0.0)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.values[index], int(self.concepts[index]), self.name(index))

    def name(self, index: int) -> str:
        return f"sample {index}"


def recipe(**parts: Any) -> Recipe:
    """A recipe of width 16."""
    return Recipe("A test", source="", data="", **{"model": Shape(16, 2, 8), **parts})


def collator(of: Recipe, source: Source) -> Collator:
    return Collator(of.streams, TOKENIZER, tuple(source.classes))


def collated(of: Recipe, source: Source, step: int = 0) -> Batch:
    """All samples as one batch, in float64."""
    read = source.read_some(range(len(source)))
    batch = collator(of, source)(read.samples, read.items, step)
    return dataclasses.replace(batch, streams={name: doubled(packed) for name, packed in batch.streams.items()})


def doubled(packed: PackedBatch) -> PackedBatch:
    return packed._with_tensors(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def built(of: Recipe, source: Source) -> Model:
    """The model in float64, its weights away from zero, where residual branches begin."""
    torch.manual_seed(0)
    model = Model(of, Facts(of.model, len(TOKENIZER), source.classes, of.streams))
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.double()


def gradients(model: Model, batch: Batch, chunk: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch, and the gradient of each parameter that has one."""
    model.zero_grad()
    weights = dict.fromkeys(model.objectives, 1.0)
    cache = GradCache(model.encoders(), model.loss(batch, weights, chunk), chunk_size=chunk)
    loss, _ = cache(*(batch[name] for name in model.encoded))
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def held_out(of: Recipe, train: Source, source: Source) -> HeldOut:
    return HeldOut("held_out", source, collator(of, train), torch.device("cpu"), train, samples=3)
