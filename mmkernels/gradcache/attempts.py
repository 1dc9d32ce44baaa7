"""Steps with automatic sizes: measured before the first, begun anew with smaller chunks when memory runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from mmkernels.gradcache.auto import AutoSize
from mmkernels.gradcache.backward import Undo, out_of_memory
from mmkernels.gradcache.shards import Shards
from mmkernels.gradcache.step import RanOut, Step
from mmkernels.gradcache.sync import Sync, anywhere

__all__ = ["Attempts"]


class Attempts:
    """The attempts at one step.

    Args:
        auto: the sizes.
        inputs: one per encoder.
        modules: all that may run.
        group: the ranks that train together, if known.
        make: chunks of each encoder -> a step.
        told: called with the sizes of every attempt.
    """

    def __init__(
        self,
        auto: AutoSize,
        inputs: Sequence[Any],
        modules: list[nn.Module],
        group: Any,
        make: Callable[[list[list[Any]]], Step],
        told: Callable[[list[int]], None],
    ) -> None:
        self._auto, self._inputs, self._modules, self._make, self._told = auto, inputs, modules, make, told
        self._sync = Sync(modules)
        if self._sync.ddp_over_ranks():
            self._sync.expect_no_static_graph()  # measuring is a step too
        self._peers = self._sync.groups() if group is None else [group]
        self.shards = Shards(self._sync.fsdp)
        self._sizes: list[int] = []

    def run(self, act: Callable[[Step], Any], begun: Step | None = None, *, gradients: bool = True) -> tuple[Step, Any]:
        """Act on a step; if memory runs out, undo that and act on one with smaller chunks, on all ranks together.

        Args:
            act: what may run out of memory.
            begun: the first step to act on; None for a new one.
            gradients: whether `act` may change gradients.

        Returns:
            the step of the attempt that succeeded, and what `act` returned.
        """
        with self.shards.kept():
            self.shards.gather()
            self._measure()
            while True:
                step = begun or self._next()
                devices = {device for tower in step.towers for device in tower.devices}
                step.undo = undo = Undo(self._modules, devices, gradients=gradients)
                try:
                    return step, act(step)
                except RanOut as error:
                    undo.restore()
                    short = [i for i, tower in enumerate(step.towers) if tower in error.towers]
                    halved = self._auto.back_off(self._sizes, [tower.chunks for tower in step.towers], short)
                    _raise_together(None if halved else error.cause, self._peers)
                begun = None
                del step
                gc.collect()  # the error's frames hold activations
                if torch.cuda.is_initialized():
                    torch.cuda.empty_cache()
                self.shards.gather()  # those already reduced, the same on every rank

    def _measure(self) -> None:
        if self._auto.measured:
            return
        failed: Exception | None = None
        try:
            self._auto.fit(self._inputs, self._modules, self._sync)
        except Exception as error:
            if not out_of_memory(error):
                raise
            failed = error
        _raise_together(failed, self._peers)
        self._auto.measured = True

    def _next(self) -> Step:
        self._sizes, chunks = self._auto.cut(self._inputs)
        self._told(self._sizes)
        step = self._make(chunks)
        step.peers = self._peers
        return step


def _raise_together(error: BaseException | None, peers: Sequence[Any]) -> None:
    """Raise one rank's error on all: the others would wait for it."""
    if anywhere(error is not None, peers):
        raise error or RuntimeError(
            "chunk_size: memory ran out on another rank, with a single sample in each chunk"
        ) from None
