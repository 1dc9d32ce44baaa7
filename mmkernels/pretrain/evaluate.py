"""Held-out retrieval, both ways: recall at 1, 5 and 10, and chance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmkernels.pretrain.data import RetrievalSet, Tokenizer, plain_images
from mmkernels.pretrain.model import DualEncoder

__all__ = ["KS", "Embedded", "Recall", "embed", "evaluate", "ranks"]

KS = (1, 5, 10)
_BLOCK = 512  # queries ranked at a time
_SAMPLES = 128  # embedded at a time


@dataclass(frozen=True)
class Recall:
    """Fraction of queries whose target is among the k nearest, by k, and the same at chance."""

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]
    chance_image_to_text: dict[int, float]
    chance_text_to_image: dict[int, float]
    images: int
    captions: int

    def to_dict(self) -> dict[str, Any]:
        shares = {
            name: {str(k): v for k, v in getattr(self, name).items()}
            for name in ("image_to_text", "text_to_image", "chance_image_to_text", "chance_text_to_image")
        }
        return {**shares, "images": self.images, "captions": self.captions}


@dataclass(frozen=True)
class Embedded:
    """A held-out set in the shared space."""

    images: Tensor  # [Q, E] float32
    captions: Tensor  # [G, E] float32
    targets: Tensor  # [Q] int64, index of each image's caption


def embed(model: DualEncoder, held_out: RetrievalSet, tokenizer: Tokenizer) -> Embedded:
    """Embed a held-out set, in evaluation mode and without gradients."""
    device = next(model.parameters()).device
    size = model.config.image_size
    with _evaluating(model):
        images = [
            model.image(plain_images(held_out.images[i : i + _SAMPLES], size).to(device)).float()
            for i in range(0, len(held_out.images), _SAMPLES)
        ]
        captions = [
            model.text(tokenizer(held_out.captions[i : i + _SAMPLES])).float()
            for i in range(0, len(held_out.captions), _SAMPLES)
        ]
    return Embedded(torch.cat(images), torch.cat(captions), torch.from_numpy(held_out.targets).to(device))


def ranks(embedded: Embedded) -> tuple[Tensor, Tensor]:
    """Number of wrong answers ranked before the first right one, for each image [Q] and each caption [G].

    Ties and NaN count as wrong answers ranked before the right one, so a collapsed model scores zero.
    """
    images, captions, targets = embedded.images, embedded.captions, embedded.targets
    numbers = torch.arange(len(captions), device=targets.device)

    def of_images(rows: slice) -> tuple[Tensor, Tensor]:
        return images[rows] @ captions.T, targets[rows, None] == numbers

    def of_captions(rows: slice) -> tuple[Tensor, Tensor]:
        return captions[rows] @ images.T, numbers[rows, None] == targets

    return _count(of_images, len(images)), _count(of_captions, len(captions))


def _count(block: Callable[[slice], tuple[Tensor, Tensor]], queries: int) -> Tensor:
    counts = []
    for start in range(0, queries, _BLOCK):
        scores, right = block(slice(start, start + _BLOCK))
        best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        counts.append((~(scores < best) & ~right).sum(1))
    return torch.cat(counts) if counts else torch.empty(0, dtype=torch.int64)


def evaluate(model: DualEncoder, held_out: Mapping[str, RetrievalSet], tokenizer: Tokenizer) -> dict[str, Recall]:
    """Recall on each held-out set."""
    results = {}
    for name, one in held_out.items():
        image_ranks, caption_ranks = ranks(embed(model, one, tokenizer))
        chance = {k: one.chance(k) for k in KS}
        results[name] = Recall(
            {k: (image_ranks < k).double().mean().item() for k in KS},
            {k: (caption_ranks < k).double().mean().item() for k in KS},
            {k: chance[k].image_to_text for k in KS},
            {k: chance[k].text_to_image for k in KS},
            len(one.targets),
            len(one.captions),
        )
    return results


@contextmanager
def _evaluating(model: DualEncoder) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
