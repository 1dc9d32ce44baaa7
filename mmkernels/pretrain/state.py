"""What a run carries beside weights: momentum twins and queues, as buffers, so that checkpoints have them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels import PackedBatch

__all__ = ["Ema", "Queue", "Twin", "Twins"]


@dataclass(frozen=True)
class Ema:
    """An exponential moving average of weights."""

    decay: float = 0.995
    """Share of its old weights that a twin keeps at each step."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay: expected 0 <= decay < 1, got {self.decay}")


class Twin(nn.Module):
    """A copy of a module that follows it slowly and never learns.

    Args:
        module: to follow.
        decay: share of the old weights kept at each step.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.module = copy.deepcopy(module).requires_grad_(False)

    @torch.no_grad()
    def follow(self, module: nn.Module) -> None:
        """theirs = decay * theirs + (1 - decay) * the module's; buffers are copied."""
        for mine, new in zip(self.module.parameters(), module.parameters(), strict=True):
            mine.lerp_(new.detach().to(mine.dtype), 1 - self.decay)
        for buffer, now in zip(self.module.buffers(), module.buffers(), strict=True):
            buffer.copy_(now)


class Twins(nn.Module):
    """The momentum twins of some streams.

    Args:
        streams: encoder modules by stream.
        decays: of the streams that have a twin.
    """

    def __init__(self, streams: Mapping[str, nn.Module], decays: Mapping[str, float]) -> None:
        super().__init__()
        self.of: Any = nn.ModuleDict({name: Twin(streams[name], decay) for name, decay in decays.items()})

    @torch.no_grad()
    def embeddings(self, batch: Mapping[str, PackedBatch], owner: Mapping[str, str], chunk: int) -> dict[str, Tensor]:
        """Embeddings [S, E] of some streams.

        Args:
            batch: packed tokens by stream.
            owner: of each stream that is wanted, the one whose encoder it shares.
            chunk: samples at a time.
        """
        found = {}
        for stream, own in owner.items():
            module = self.of[own].module
            found[stream] = torch.cat([module.embeddings(part) for part in batch[stream].split(chunk)])
        return found

    def follow(self, streams: Mapping[str, nn.Module]) -> None:
        for name, twin in self.of.items():
            twin.follow(streams[name])


class Queue(nn.Module):
    """The newest keys of earlier batches, oldest overwritten first.

    Args:
        size: most keys.
        dim: E.
    """

    rows: Tensor
    place: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"queue: expected at least 1 key, got {size}")
        self.register_buffer("rows", torch.zeros(size, dim))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))  # keys pushed in all

    def __len__(self) -> int:
        return min(int(self.place), len(self.rows))

    def keys(self) -> Tensor:
        """[n, E], n at most the size."""
        return self.rows[: len(self)].clone()

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Add keys [n, E]; of more than the size, the last ones stay."""
        size, first = len(self.rows), int(self.place)
        kept = keys[-size:]
        at = (torch.arange(first + len(keys) - len(kept), first + len(keys), device=keys.device)) % size
        self.rows[at] = kept.to(self.rows.dtype)
        self.place += len(keys)
