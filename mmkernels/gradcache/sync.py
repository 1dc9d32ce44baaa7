"""Encoders over several ranks: when gradients are reduced, and what ranks must agree on before a collective."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmkernels.gradcache.shards import Shards
from mmkernels.ops.checks import wrong_value
from mmkernels.runtime.groups import device_of_numbers

__all__ = ["Sync", "anywhere", "reduced"]


class Sync:
    """The DistributedDataParallel and fully_shard modules behind some encoders.

    Args:
        modules: where to look; wrappers inside them, as in a compiled module, are found too.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        inner = {id(m): m for module in modules for m in module.modules()}.values()
        self.ddp: list[DistributedDataParallel] = [m for m in inner if isinstance(m, DistributedDataParallel)]
        fsdp = sys.modules.get("torch.distributed.fsdp")  # an import takes a second; sharded models have done it
        self.fsdp: list[Any] = [m for m in inner if fsdp is not None and isinstance(m, fsdp.FSDPModule)]
        self.norms = [m for m in inner if isinstance(m, nn.SyncBatchNorm) and m.training and dist.is_initialized()]

    def ids(self) -> set[int]:
        return {id(m) for m in (*self.ddp, *self.fsdp)}

    def ddp_over_ranks(self) -> bool:
        return any(m.process_group.size() > 1 for m in self.ddp)

    def expect_no_static_graph(self) -> None:
        """A static graph allows one forward and one backward, with its reduction, per step.

        Raises:
            ValueError: a wrapper has one; PyTorch would fail an internal assert.
        """
        if any(m.static_graph for m in self.ddp):
            raise ValueError(
                "encoders: expected DistributedDataParallel without static_graph=True, because an encoder runs several "
                "times per step, got one with it"
            )

    def awaited(self, from_loss: Iterable[Tensor]) -> list[Tensor]:
        """The parameters that a reducer waits for. One that finds unused parameters itself looks for them in what its
        wrapper's last forward returned, and knows nothing of those with gradients `from_loss`."""
        known = {id(leaf) for leaf in from_loss}
        every = [
            (p, m.find_unused_parameters)
            for m in self.ddp
            for p in m.parameters()
            if p.requires_grad and m.require_backward_grad_sync  # inside the caller's no_sync nothing is awaited
        ]
        return [p for p, looked_for in every if not looked_for or id(p) in known]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, backward accumulates local gradients; nothing is reduced, and shards stay gathered."""
        with ExitStack() as stack:
            for wrapper in self.ddp:
                stack.enter_context(wrapper.no_sync())
            before = Shards(self.fsdp).syncing()
            self._set_fsdp([(False, False)] * len(before))
            try:
                yield
            finally:
                self._set_fsdp(before)

    def syncing(self) -> list[bool]:
        """Whether each DistributedDataParallel module reduces, as the caller's `no_sync` has it now."""
        return [m.require_backward_grad_sync for m in self.ddp]

    @contextmanager
    def set_syncing(self, each: Sequence[bool]) -> Iterator[None]:
        """Inside, each DistributedDataParallel module reduces or not."""
        before = self.syncing()
        try:
            for wrapper, so in zip(self.ddp, each, strict=True):
                wrapper.require_backward_grad_sync = so
            yield
        finally:
            for wrapper, so in zip(self.ddp, before, strict=True):
                wrapper.require_backward_grad_sync = so

    def _set_fsdp(self, each: Sequence[tuple[bool, bool]]) -> None:
        for module, (reduces, reshards) in zip(self.fsdp, each, strict=True):
            module.set_requires_gradient_sync(reduces, recurse=False)
            module.set_reshard_after_backward(reshards, recurse=False)

    def groups(self) -> list[Any]:
        """The process groups that gradients are reduced over."""
        return _distinct([*(m.process_group for m in self.ddp), *self._sharded_over()])

    def expect_equal(self, counts: list[int], gathered: bool) -> None:
        """Sharded parameters and SyncBatchNorm communicate in every forward, so ranks must run the same number.

        Args:
            counts: chunks of each encoder.
            gathered: sharded parameters are already gathered and do not communicate.

        Raises:
            ValueError: on every rank, if the counts differ.
        """
        sharded = [] if gathered or Shards(self.fsdp).stay_gathered() else self._sharded_over()
        for group in _distinct([*(m.process_group or dist.group.WORLD for m in self.norms), *sharded]):
            most = reduced([*counts, *(-n for n in counts)], group, "max").tolist()
            if most[: len(counts)] != [-n for n in most[len(counts) :]]:
                expected = "as many chunks on every rank (fully_shard and SyncBatchNorm communicate in every forward)"
                wrong_value("inputs", expected, f"{counts} chunks here")

    def _sharded_over(self) -> list[Any]:
        return [mesh.get_group(i) for mesh in Shards(self.fsdp).meshes() for i in range(mesh.ndim)]


def _distinct(groups: Iterable[Any]) -> list[Any]:
    return list({id(group): group for group in groups}.values())


def reduced(values: Sequence[float] | Tensor, group: Any, op: str = "sum") -> Tensor:
    """The elementwise sum or maximum over the ranks of a group, float64 on the host."""
    flat = torch.as_tensor(values, dtype=torch.float64).detach()
    moved = flat.to(device_of_numbers(group), copy=True)
    dist.all_reduce(moved, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM, group=group)
    return moved.cpu()


def anywhere(so: bool, groups: Iterable[Any]) -> bool:
    """Whether `so` is true on any rank of these groups."""
    for group in groups:
        so = bool(reduced([so], group, "max").item())
    return so
