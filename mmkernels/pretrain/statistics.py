"""Running statistics of BatchNorm and InstanceNorm layers, which every forward in training changes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from mmkernels.pretrain.ranks import ALONE, Ranks

__all__ = ["Statistics"]

_SHOWN = 3  # layers that a message names


class Statistics:
    """The statistics of all such layers of a model.

    Args:
        model: that learns.
        followers: modules that follow it.
        ranks: who train it together.
    """

    def __init__(self, model: nn.Module, followers: Sequence[nn.Module] = (), ranks: Ranks = ALONE) -> None:
        self.ranks, self._told = ranks, False
        self.layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)}
        self._own = _buffers_of([model])
        self._every = [*self._own, *_buffers_of(followers)]
        self._kept: list[Tensor] = []

    def keep(self) -> None:
        """Before a step: what `restore` goes back to."""
        self._kept = [buffer.clone() for buffer in self._every]

    @torch.no_grad()
    def restore(self) -> None:
        """Undo what has been seen since `keep`."""
        for buffer, before in zip(self._every, self._kept, strict=True):
            buffer.copy_(before)

    @torch.no_grad()
    def share(self) -> None:
        """After a step: those of rank 0 on all ranks, so that all evaluate, freeze and save the same."""
        if self.ranks.group is None or not self._own:
            return
        flat = self.ranks.of_rank_0(torch.cat([buffer.flatten().double().cpu() for buffer in self._own]))
        for buffer, values in zip(self._own, flat.split([buffer.numel() for buffer in self._own]), strict=True):
            buffer.copy_(values.view(buffer.shape))

    def warning(self) -> str:
        """What to say, once, of layers that normalise by the samples of one rank; empty: there are none."""
        names = [n for n, layer in self.layers.items() if layer.training and not isinstance(layer, nn.SyncBatchNorm)]
        if self.ranks.group is None or self._told or not names:
            return ""
        self._told = True
        shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        return (
            f"BatchNorm ({shown}) normalises by the samples of each rank alone, so losses depend on the number of "
            "ranks; its running statistics are those of rank 0. torch.nn.SyncBatchNorm.convert_sync_batchnorm makes a "
            "module normalise by those of all"
        )


def _buffers_of(modules: Sequence[nn.Module]) -> list[Tensor]:
    layers = (layer for module in modules for layer in module.modules() if isinstance(layer, _NormBase))
    return [buffer for layer in layers for buffer in layer.buffers(recurse=False)]
