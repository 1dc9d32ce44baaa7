"""Floating-point operations of a run's steps, by the formulas that PyTorch has for its ops and mmkernels for its own.

Counting takes time, so one step of each kind is counted; others of its kind are taken to need as many for each unit of
work in their batch. What has been counted belongs to a run's state: it is counted in the same steps whether a run was
resumed or not.

Source of the measure: Chowdhery et al. 2022 (PaLM, arXiv:2204.02311), model flop utilization.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mmkernels import Machine
from mmkernels.pretrain.ranks import Ranks

__all__ = ["Flops"]


class _Counter(TorchDispatchMode):
    """FlopCounterMode without its hooks on modules, with which `torch.autograd.grad` cannot run inside."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


class Flops:
    """Those of forward and backward on all ranks. What gradient caching embeds a second time counts once; activations
    that are recomputed in the backward, and fused features in a batch of several chunks, count as often as computed.

    Args:
        device: of this rank.
        dtype: of products.
        ranks: who train together.
        encoders: modules that gradient caching may run twice.
        countable: whether they can be: not those of compiled code.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        ranks: Ranks,
        encoders: Iterable[nn.Module] = (),
        countable: bool = True,
    ) -> None:
        self.ranks, self._countable = ranks, countable
        self._peak = Machine.peak(device, dtype)
        self._per_work: dict[str, float] = {}
        self._counter: _Counter | None = None
        self._repeated: int | None = None  # by encoders after the loss
        self._now = 0.0
        for encoder in encoders:
            encoder.register_forward_pre_hook(lambda *_: self._repeat(-1))
            encoder.register_forward_hook(lambda *_: self._repeat(1))

    @contextmanager
    def step(self, kind: str, work: float) -> Iterator[None]:
        """Around a forward and backward.

        Args:
            kind: steps of a kind need flop in proportion to the work in their batches.
            work: in the batch of all ranks, of which `workload` is a measure.
        """
        if not self._countable or kind in self._per_work or work <= 0:
            yield
        else:
            self._repeated = None
            with _Counter() as self._counter:
                yield
            counted, self._counter = self._counter.total - (self._repeated or 0), None
            self._per_work[kind] = float(self.ranks.table([counted]).sum()) / work
        self._now = self._per_work.get(kind, 0.0) * work

    def losing(self) -> None:
        """Called before the loss: what is embedded after it was embedded before."""
        self._repeated = 0

    def _repeat(self, sign: int) -> None:
        if self._counter is not None and self._repeated is not None:
            self._repeated += sign * self._counter.total

    def figures(self, seconds: float) -> dict[str, float]:
        """Of the last step, which took so long: `flops`, flop/s of a rank; `mfu`, their share of the peak that a GPU's
        data sheet has."""
        if not self._now:
            return {}
        rate = self._now / self.ranks.size / seconds
        return {"flops": rate, **({} if self._peak is None else {"mfu": rate / self._peak})}

    def state_dict(self) -> dict[str, float]:
        return dict(self._per_work)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self._per_work = dict(state)
