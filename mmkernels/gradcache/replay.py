"""State that both forwards must start from: random generators and BatchNorm's statistics."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["RandomState", "batch_norms", "cuda_devices", "kept"]


@dataclass(frozen=True)
class RandomState:
    """States of the global generators: PyTorch's for the CPU and the CUDA devices in use, NumPy's and Python's.

    An encoder's own generator cannot be found; `Passes` detects its effect.
    """

    cpu: Tensor
    cuda: dict[torch.device, Tensor]
    numpy: dict[str, Any]
    python: tuple[Any, ...]

    @staticmethod
    def now(devices: Iterable[torch.device]) -> RandomState:
        cuda = {device: torch.cuda.get_rng_state(device) for device in devices}
        return RandomState(torch.get_rng_state(), cuda, np.random.get_state(legacy=False), random.getstate())

    def restore(self, numpy: bool = True) -> None:
        torch.set_rng_state(self.cpu)
        random.setstate(self.python)
        if numpy:
            np.random.set_state(self.numpy)
        for device, state in self.cuda.items():
            torch.cuda.set_rng_state(state, device)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside, the generators continue from this state; afterwards they are as if nothing had been drawn."""
        after = RandomState.now(self.cuda)
        moved = not _same(self.numpy, after.numpy)  # setting it takes longer than everything else here
        self.restore(moved)
        try:
            yield
        finally:
            after.restore(moved)


def _same(a: Any, b: Any) -> bool:
    """Whether two states of NumPy's generator, dicts of numbers and arrays, are equal."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    return bool(np.array_equal(a, b))


def cuda_devices(tensors: Iterable[Tensor]) -> set[torch.device]:
    """The CUDA devices of these tensors, and the current one; empty where CUDA is not in use."""
    if not torch.cuda.is_initialized():
        return set()
    return {t.device for t in tensors if t.is_cuda} | {torch.device("cuda", torch.cuda.current_device())}


def batch_norms(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The BatchNorm layers in training mode."""
    layers = (layer for module in modules for layer in module.modules())
    return [layer for layer in layers if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training]


@contextmanager
def kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restore BatchNorm's running statistics afterwards: only the first pass updates them."""
    buffers = [buffer for layer in batch_norms(modules) for buffer in layer.buffers(recurse=False)]
    values = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, values, strict=True):
                buffer.copy_(value)
