"""chunk_size="auto": when to measure, how to split, and how to recover when memory runs out."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.gradcache.backward import Undo
from mmkernels.gradcache.budget import Fit, free_memory, largest_cut, peak_memory, probe
from mmkernels.gradcache.chunks import amount, split, tensors
from mmkernels.gradcache.sync import Sync
from mmkernels.gradcache.tokens import TokenLoss
from mmkernels.gradcache.tower import Tower

__all__ = ["AutoSize", "split_together"]


class AutoSize:
    """The automatic chunk sizes of a GradCache.

    Args:
        tower: (number of an encoder, its chunks) -> its part of a step.
        encoders: how many.
        token_loss_fn: as in `GradCache`.
        asked: a size or "auto" for each encoder.
        budget: bytes, or None for the free memory.
    """

    def __init__(
        self,
        tower: Callable[[int, list[Any]], Tower],
        encoders: int,
        token_loss_fn: Callable[..., Any] | None,
        asked: Sequence[Any],
        budget: int | None,
    ) -> None:
        self._tower, self._encoders, self._token_loss_fn = tower, encoders, token_loss_fn
        self._asked, self._budget = asked, budget
        self._fits: dict[int, Fit] = {}  # per automatic encoder; with a token loss, key 0 covers all of them
        self.measured, self._warned = False, False

    def fit(self, inputs: Sequence[Any], modules: list[nn.Module], sync: Sync) -> None:
        """Measure. The caller sets `measured` once every rank has done so."""
        self._fits = {}
        known = itertools.chain(
            (t for m in modules for t in itertools.chain(m.parameters(), m.buffers())), tensors(list(inputs))
        )
        there = list(known)
        if self._token_loss_fn is not None:
            self._fits[0] = self._probe(range(len(inputs)), tuple(inputs), "inputs", 1, there, modules, sync)
            return
        wrappers = [Sync(self._tower(i, [None]).modules).ids() for i in range(self._encoders)]
        for i, size in enumerate(self._asked):
            if size == "auto":
                sharing = sum(bool(wrappers[i] & other) for other in wrappers) or 1  # they share a backward
                self._fits[i] = self._probe([i], inputs[i], f"inputs[{i}]", sharing, there, modules, sync)

    def _probe(
        self,
        members: Sequence[int],
        value: Any,
        name: str,
        sharing: int,
        known: list[Tensor],
        modules: list[nn.Module],
        sync: Sync,
    ) -> Fit:
        device = next((t.device for t in known if t.is_cuda), None)
        budget = (free_memory(device) if self._budget is None else self._budget) / sharing

        def measure(chunk: Any) -> int:
            chunks = chunk if self._token_loss_fn is not None else [chunk]
            towers = [self._tower(i, [part]) for i, part in zip(members, chunks, strict=True)]
            undo = Undo(modules, {device for tower in towers for device in tower.devices})
            try:
                with sync.held():
                    return peak_memory(lambda: self._run(towers), known, device, undo)
            finally:
                undo.restore()
                torch.clear_autocast_cache()

        return probe(value, name, measure, budget)

    def _run(self, towers: list[Tower]) -> list[Tensor]:
        outputs = [tower.run(tower.chunks[0]) for tower in towers]
        made = [tower.embedding(out) for tower, out in zip(towers, outputs, strict=True)]
        if self._token_loss_fn is not None:
            inputs = [tower.chunks[0] for tower in towers]
            made += TokenLoss(self._token_loss_fn, None).first(outputs, inputs, ()).values()
        return made

    def cut(self, inputs: Sequence[Any]) -> tuple[list[int], list[list[Any]]]:
        """The size in use and the chunks, for each encoder."""
        if self._token_loss_fn is not None:
            split_together(inputs, 1)
            size, chunks = self._cut(tuple(inputs), 0, "inputs")
            return [size] * len(inputs), [list(column) for column in zip(*chunks, strict=True)]
        cuts = []
        for i, (value, size) in enumerate(zip(inputs, self._asked, strict=True)):
            name = f"inputs[{i}]"
            cuts.append(self._cut(value, i, name) if size == "auto" else (size, split(value, size, name)))
        return [size for size, _ in cuts], [chunks for _, chunks in cuts]

    def _cut(self, value: Any, i: int, name: str) -> tuple[int, list[Any]]:
        size, chunks = largest_cut(value, self._fits[i], name)
        if size == 1 and not self._warned and max(map(amount, chunks)) > self._fits[i].largest:
            self._warned = True
            warnings.warn(f"{name}: a single sample is expected to take more than memory_budget", stacklevel=4)
        return size, chunks

    def back_off(self, sizes: Sequence[int], chunks: Sequence[list[Any]], towers: Sequence[int]) -> bool:
        """Halve the chunks of these encoders; False if none can be halved."""
        halved = False
        for i in {0} if self._token_loss_fn is not None and towers else set(towers):
            if i in self._fits and sizes[i] > 1:
                together = list(zip(*chunks, strict=True)) if self._token_loss_fn is not None else chunks[i]
                fit = self._fits[i]
                fit.largest = fit.whole + (max(map(amount, together)) - fit.whole) / 2
                halved = True
        return halved


def split_together(inputs: Sequence[Any], size: int) -> list[list[Any]]:
    """The chunks for each encoder, aligned by sample."""
    for i, value in enumerate(inputs):
        split(value, size, f"inputs[{i}]")
    return [list(column) for column in zip(*split(tuple(inputs), size, "inputs"), strict=True)]
