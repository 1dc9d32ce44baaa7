"""Running statistics of BatchNorm layers, which every forward in training changes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["Statistics"]


class Statistics:
    """The statistics of all BatchNorm layers of a module.

    Args:
        module: and what follows it.
    """

    def __init__(self, module: nn.Module) -> None:
        self.layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
        self._kept: list[Tensor] = []

    def keep(self) -> None:
        """Before a step: what `restore` goes back to."""
        self._kept = [buffer.clone() for buffer in self._buffers()]

    @torch.no_grad()
    def restore(self) -> None:
        """Undo what has been seen since `keep`."""
        for buffer, before in zip(self._buffers(), self._kept, strict=True):
            buffer.copy_(before)

    def _buffers(self) -> list[Tensor]:
        return [buffer for layer in self.layers for buffer in layer.buffers(recurse=False)]
