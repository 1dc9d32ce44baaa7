"""Reconstruct: a stream's input from its embedding alone; encoder and decoder are an autoencoder.

The mean square error of an image's pixels or of a vector; for a text the cross entropy of its tokens, whose order is
not asked for.

Source: Ngiam et al. 2011, Multimodal Deep Learning; texts as bags of words: Miao et al. 2016 (arXiv:1511.06038).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmkernels import segment_pool
from mmkernels.pretrain.batch import Batch
from mmkernels.pretrain.objectives.base import BatchObjective
from mmkernels.pretrain.recipe import Facts, Ramp
from mmkernels.pretrain.seen import Seen

__all__ = ["Reconstruct"]


@dataclass(frozen=True)
class Reconstruct:
    """A decoder from the embedding back to the input of its stream: images of one size, texts, or vectors."""

    stream: str = "image"
    """The stream."""
    hidden: int = 256
    """Width of the decoder's hidden layer."""
    weight: float | Ramp = 1.0
    """Factor of the loss."""

    @property
    def compares(self) -> tuple[str, ...]:
        return (self.stream,)

    def build(self, facts: Facts) -> ReconstructLoss:
        encoder = facts.streams[self.stream].encoder
        if hasattr(encoder, "grid"):
            return ReconstructLoss(self, facts, 3 * (encoder.grid * encoder.patch) ** 2, "pixels")
        if encoder.reads_text:
            return ReconstructLoss(self, facts, facts.vocabulary, "words")
        if isinstance(size := getattr(encoder, "size", None), int):
            return ReconstructLoss(self, facts, size, "vector")
        expected = "one of images (Patches), of the tokenizer's texts (Words) or of vectors (Frozen)"
        raise ValueError(f"streams.{self.stream}.encoder: expected {expected}, got {encoder}")


class ReconstructLoss(BatchObjective):
    def __init__(self, part: Reconstruct, facts: Facts, out: int, kind: str) -> None:
        super().__init__()
        self.part, self.stream, self.kind, self.vocabulary = part, part.stream, kind, facts.vocabulary
        self.decoder = nn.Sequential(
            nn.Linear(facts.shape.embed_dim, part.hidden), nn.GELU(approximate="tanh"), nn.Linear(part.hidden, out)
        )

    def over_batch(self, seen: Seen) -> Tensor:
        packed, rows = seen.batch[self.stream], torch.nonzero(seen.present(self.stream)).flatten()
        # A unit vector's numbers are small: scaled to a mean square of 1, as the decoder expects.
        embedded = seen.embedding(self.stream)[rows] * seen.embedding(self.stream).shape[1] ** 0.5
        found = self.decoder(embedded).float()
        everyone = int(seen.roster.present(self.stream).sum())
        if not len(rows):
            return found.sum()
        if self.kind == "words":
            owner = torch.arange(packed.num_samples, device=rows.device)
            owner = owner.repeat_interleave(packed.cu_seqlens.diff().long(), output_size=packed.num_tokens)
            place = torch.zeros_like(owner[: packed.num_samples]).new_zeros(packed.num_samples)
            place[rows] = torch.arange(len(rows), device=rows.device)
            logits = found.log_softmax(1)
            own = -logits[place[owner], packed.tokens]  # [T]
            return seen.roster.mean(segment_pool(own[:, None], packed.cu_seqlens, mode="mean")[rows], everyone)
        if self.kind == "pixels":
            (media,) = packed.media.values()
            targets = media.values.reshape(len(rows), -1).float()
        else:
            targets = segment_pool(packed.tokens.float(), packed.cu_seqlens, mode="mean")[rows]
        return seen.roster.mean((found - targets).square().mean(1), everyone)

    def chance_loss(self, batch: Batch) -> float | None:
        return math.log(self.vocabulary) if self.kind == "words" else None
