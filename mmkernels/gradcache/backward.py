"""Backward passes that can be undone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.gradcache.replay import RandomState, batch_norms
from mmkernels.gradcache.shards import Shards
from mmkernels.gradcache.sync import Sync

__all__ = ["Undo", "autocast_off", "backward", "leaves", "out_of_memory"]


class Undo:
    """A snapshot of what a step changes, so that a step that ran out of memory can restart.

    It covers the gradients, BatchNorm's running statistics and the random generators; `fully_shard` modules, which must
    be gathered, are reset to expect a forward. A gradient accumulated earlier is copied when a backward first reaches
    it.

    Args:
        modules: those whose parameters and statistics the step may change.
        devices: CUDA devices with generators that the step may use.
        gradients: whether the step may change gradients.
    """

    def __init__(
        self, modules: Iterable[nn.Module], devices: Iterable[torch.device], *, gradients: bool = True
    ) -> None:
        modules = list(modules)
        self._before: dict[int, tuple[Tensor, Tensor | None, Tensor | None]] = {}
        self._random = RandomState.now(devices)
        self._statistics = [(b, b.clone()) for norm in batch_norms(modules) for b in norm.buffers(recurse=False)]
        self._shards = Shards(Sync(modules).fsdp)
        self._accumulated: list[tuple[Any, Tensor | None]] = []
        if gradients:
            # Reentrant checkpoints hide their parameters from the graph.
            self.keep(p for module in modules for p in module.parameters() if p.requires_grad)
            self.keep(p for p in self._shards.parameters() if p.requires_grad)
            self._accumulated = [(s, None if grad is None else grad.clone()) for s, grad in self._shards.accumulated()]

    def keep(self, leaves: Iterable[Tensor]) -> None:
        for leaf in leaves:
            if id(leaf) not in self._before:
                grad = leaf.grad
                self._before[id(leaf)] = leaf, grad, None if grad is None else grad.clone()

    @torch.no_grad()
    def restore(self) -> None:
        self._shards.reset()
        for shard, value in self._accumulated:
            shard.unsharded_accumulated_grad = value
        for leaf, grad, value in self._before.values():
            if grad is not None and value is not None:
                grad.copy_(value)  # in place: it may be a view of a reducer's bucket
            leaf.grad = grad
        for buffer, value in self._statistics:
            buffer.copy_(value)
        self._random.restore()


def backward(outputs: Sequence[Tensor], gradients: Sequence[Tensor | None], undo: Undo | None = None) -> bool:
    """Backward from the outputs that have a graph; False if none has one."""
    live = [i for i, out in enumerate(outputs) if out.requires_grad]
    if live and undo is not None:
        undo.keep(leaf for i in live for leaf in leaves(outputs[i]))
    with autocast_off():
        if live:
            torch.autograd.backward([outputs[i] for i in live], [gradients[i] for i in live])
    return bool(live)


def leaves(output: Tensor, ends: Mapping[tuple[Any, int], Tensor] = MappingProxyType({})) -> list[Tensor]:
    """The leaves that a backward from this tensor sends gradients to, and those of `ends`, {(grad_fn, output_nr):
    tensor}, where it ends."""
    if output.grad_fn is None:
        return [output] if output.requires_grad else []
    found: dict[int, Tensor] = {}
    seen: set[Any] = {None}
    stack: list[tuple[Any, int]] = [(output.grad_fn, output.output_nr)]
    while stack:
        node, number = stack.pop()
        end = ends.get((node, number))
        if end is None and node not in seen:
            seen.add(node)
            stack.extend(node.next_functions)
            end = getattr(node, "variable", None)
        if end is not None:
            found[id(end)] = end
    return list(found.values())


@contextmanager
def autocast_off() -> Iterator[None]:
    """Backward runs in the dtypes that forward chose, outside autocast."""
    with ExitStack() as stack:
        for device_type in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a device or on the host."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # PyTorch's CPU allocator
