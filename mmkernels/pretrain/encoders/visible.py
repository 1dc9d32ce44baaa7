"""The patches of a batch that an encoder sees: all, or those that no view has hidden."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels import PackedBatch
from mmkernels.pretrain.tokens import Layout

__all__ = ["Visible", "places_in", "visible_of"]


class Visible(NamedTuple):
    """The V visible ones of the T patches of a batch, items and samples in order."""

    rows: Tensor | None  # int64 [V], which patches; None: all of them
    before: Tensor | None  # int64 [T + 1]: visible ones before each patch

    def ends(self, cu_seqlens: Tensor) -> Tensor:
        """int32 [n + 1]: boundaries among all patches -> boundaries among the visible ones."""
        return cu_seqlens if self.before is None else self.before[cu_seqlens.long()].int()

    def layout(self, batch: PackedBatch, items: Tensor | None = None) -> Layout:
        """Where the samples lie among the visible patches; items int32 [T], those of the patches, as `Layout.media`."""
        cu_seqlens = self.ends(batch.cu_seqlens)
        host = batch.cu_seqlens_host if self.before is None else tuple(cu_seqlens.tolist())
        return Layout(cu_seqlens, host, media=None if items is None else self.of(items))

    def of(self, per_patch: Tensor) -> Tensor:
        """[T, ...] -> [V, ...]"""
        return per_patch if self.rows is None else per_patch[self.rows]


def visible_of(batch: PackedBatch) -> Visible:
    """What a view that hides patches (`MaskPatches`) has left: those without a label."""
    if batch.labels is None:
        return Visible(None, None)
    shown = batch.labels < 0
    return Visible(torch.nonzero(shown).flatten(), F.pad(shown.cumsum(0), (1, 0)))


def places_in(cu_items: Tensor, patches: int) -> Tensor:
    """int64 [T]: the place of each of `patches` patches in its item, from 0."""
    firsts = cu_items[:-1].long().repeat_interleave(cu_items.diff().long(), output_size=patches)
    return torch.arange(patches, device=firsts.device) - firsts
