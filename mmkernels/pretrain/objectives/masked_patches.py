"""Masked patches: a small decoder paints what a view has hidden, from the encoded rest.

Source: He et al. 2022 (MAE, arXiv:2111.06377).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmkernels import AttentionMask, PackedBatch, embed_splice
from mmkernels.pretrain.batch import Batch
from mmkernels.pretrain.layers import Blocks
from mmkernels.pretrain.objectives.base import TokenObjective
from mmkernels.pretrain.recipe import Facts, Ramp
from mmkernels.pretrain.seen import Chunk

__all__ = ["MaskedPatches"]


@dataclass(frozen=True)
class MaskedPatches:
    """Mean square error over the numbers of hidden patches: pixels of an image or a clip, mels of a recording."""

    stream: str = "image"
    """The stream, which needs a view that hides patches (`MaskPatches`)."""
    weight: float | Ramp = 1.0
    """Factor of the loss."""
    layers: int = 1
    """Transformer blocks of the decoder."""
    normalize: bool = True
    """Predict each patch less its mean, divided by its standard deviation: its structure, not its brightness."""

    def build(self, facts: Facts) -> MaskedPatchesLoss:
        stream = facts.streams[self.stream]
        if not any(getattr(view, "hides", False) for view in stream.views):
            got = f"got {stream.views}"
            raise ValueError(f"streams.{self.stream}.views: expected one that hides patches (MaskPatches), {got}")
        if not getattr(stream.encoder, "may_hide", False):
            expected = "expected one that can leave patches out (Patches with a linear stem, Tubelets, Spectrogram)"
            raise ValueError(f"streams.{self.stream}.encoder: {expected}, got {stream.encoder}")
        return MaskedPatchesLoss(self, facts)


class MaskedPatchesLoss(TokenObjective):
    def __init__(self, part: MaskedPatches, facts: Facts) -> None:
        super().__init__()
        self.part, self.backend = part, facts.backend
        encoder, width = facts.streams[part.stream].encoder, facts.shape.width
        self.norm, self.enter = nn.LayerNorm(width), nn.Linear(width, width)
        self.hidden = nn.Parameter(0.02 * torch.randn(1, width))
        self.position = nn.Parameter(0.5 * torch.randn(encoder.places, width))
        self.blocks = Blocks(part.layers, facts)
        self.norm_out, self.project = nn.LayerNorm(width), nn.Linear(width, encoder.values)
        nn.init.normal_(self.project.weight, std=0.02)  # the first guess is nearly the mean of normalised patches
        nn.init.zeros_(self.project.bias)

    def over_tokens(self, chunk: Chunk) -> tuple[Tensor, float]:
        painted, targets = self.painted(chunk)
        return (painted.float() - targets).square().mean(1).sum(), len(targets)

    def painted(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """(what the decoder paints, what was there): [n, K] each, of the chunk's n hidden patches."""
        batch, seen = chunk.batch[self.part.stream], chunk.fused[self.part.stream].x
        _, cu_items = patches_of(batch)
        label = labels_of(batch)
        x = self.enter(self.norm(seen))
        # Encoded patches go back to their places, among as many copies of one learned token as are hidden.
        shown = torch.nonzero(label < 0).flatten()
        x = embed_splice(torch.zeros_like(label), self.hidden.to(x.dtype), x, shown, backend=self.backend)
        lengths = cu_items.diff().long()
        firsts = cu_items[:-1].long().repeat_interleave(lengths, output_size=len(label))
        places = torch.arange(len(label), device=label.device) - firsts
        x = self.blocks(x + self.position[places], AttentionMask.packed(cu_items))
        return self.project(self.norm_out(x[label >= 0])), self.targets(batch)

    def owners(self, chunk: Chunk) -> Tensor:
        """int64 [n]: the sample, by its place in the chunk, of each hidden patch."""
        batch = chunk.batch[self.part.stream]
        label, lengths = labels_of(batch), patches_of(batch)[1].diff().long()
        samples = torch.arange(batch.num_samples, device=label.device)
        if batch.media:  # each sample that has the stream has one item, of which something is seen
            samples = samples[batch.cu_seqlens.diff() > 0]
        return samples.repeat_interleave(lengths, output_size=len(label))[label >= 0]

    def targets(self, batch: PackedBatch) -> Tensor:
        """float [n, K]: the hidden patches of a batch."""
        hidden = labels_of(batch) >= 0
        if not len(hidden):
            return self.hidden.new_zeros((0, self.project.out_features))
        found = patches_of(batch)[0][hidden]
        if self.part.normalize:
            deviation, mean = torch.std_mean(found, 1, keepdim=True)
            found = (found - mean) / (deviation.square() + 1e-6).sqrt()
        return found

    def chance_loss(self, batch: Batch) -> float | None:
        """Of the mean of the batch's hidden patches, the best guess that is the same for all."""
        own = self.targets(batch[self.part.stream]).double()
        sums = torch.cat([own.new_tensor([len(own)]), own.sum(0), own.square().sum(0)]).cpu()
        count, total, squares = batch.roster.ranks.total(sums).split([1, own.shape[1], own.shape[1]])
        return float((squares / count - (total / count).square()).mean()) if count else None


def patches_of(batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """(patches float [T, K], boundaries of their items int32 [n + 1])."""
    for media in batch.media.values():
        return media.values, media.cu_values
    return batch.tokens, batch.cu_seqlens


def labels_of(batch: PackedBatch) -> Tensor:
    """int64 [T]: the place of a hidden patch in its item, -100 of a visible one."""
    if batch.labels is None:  # no sample of this batch has the stream
        return torch.full((batch.num_tokens,), -100, device=batch.tokens.device)
    return batch.labels
