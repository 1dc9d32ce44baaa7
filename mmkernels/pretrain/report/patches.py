"""Masked patches: an image, what was visible of it, and what the model painted."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmkernels.pretrain.metrics import HeldOut
from mmkernels.pretrain.objectives.masked_patches import MaskedPatchesLoss, labels_of, patches_of
from mmkernels.pretrain.pages import data_url
from mmkernels.pretrain.report.section import Run, Section, first_found, objectives_of, some, titled
from mmkernels.pretrain.report.shown import of_patches

__all__ = ["masked_patches"]

_IMAGES = 12


@dataclass(frozen=True)
class Painted:
    name: str
    whole: str
    visible: str
    painted: str  # hidden patches painted, visible ones as they are


def masked_patches(run: Run) -> list[Section]:
    """Of images; clips and recordings have no such section."""
    sections = []
    for name, objective in objectives_of(run, MaskedPatchesLoss):
        encoder = run.recipe.streams[objective.part.stream].encoder
        if (
            hasattr(encoder, "grid")
            and encoder.values == 3 * encoder.patch**2
            and (shown := first_found(run, partial(_images, run, name, encoder)))
        ):
            held_out, found = shown
            about = (
                f"Images of split {held_out.name}: whole, what the model sees of them, and with the hidden patches as "
                "it paints them."
            )
            if objective.part.normalize:
                about += " It paints each patch less its mean, divided by its deviation; both are put back for the eye."
            sections.append(Section("patches", titled("Masked patches", name, run, MaskedPatchesLoss), about, found))
    return sections


def _images(run: Run, name: str, encoder: Any, held_out: HeldOut) -> list[Painted]:
    batch, objective = some(held_out, _IMAGES, "loss", name), run.trained.objectives[name]
    if batch is None or not len((packed := batch[objective.part.stream]).tokens):
        return []
    guessed, _ = objective.painted(run.trained.whole(batch, name))
    (patches, _), hidden = patches_of(packed), labels_of(packed) >= 0
    there = patches[hidden].float()
    if objective.part.normalize:
        deviation, mean = torch.std_mean(there, 1, keepdim=True)
        guessed = guessed.float() * (deviation.square() + 1e-6).sqrt() + mean

    def drawn(values: Tensor) -> list[str]:
        return [data_url(image) for image in of_patches(values, encoder.grid, encoder.patch)]

    visible, painted = patches.float().clone(), patches.float().clone()
    visible[hidden], painted[hidden] = 0.75, guessed.float()
    lengths = packed.cu_seqlens.diff().tolist()
    names = [each for each, length in zip(batch.names, lengths, strict=True) if length]
    return [Painted(*each) for each in zip(names, drawn(patches), drawn(visible), drawn(painted), strict=True)]
