"""A loss whose backward is the rest of a step: it runs when a trainer's own backward reaches the loss.

    forward     pass 1, and the loss of the detached embeddings
    backward    the loss's backward times the gradient that comes in, and pass 3

The loss keeps its graph in between: a factor of it (a loss scale, 1 / accumulated batches) reaches the embeddings'
gradient before anything is rounded, as if the trainer had multiplied the loss of one graph.

Gradients of parameters are handed to autograd as those of the loss's inputs, so that each is accumulated once, in the
trainer's backward, where hooks expect it: those of a wrapper around the whole model, of DeepSpeed, of an optimizer.
Encoders that are wrapped themselves need a backward of their own through each chunk.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.gradcache.attempts import Attempts
from mmkernels.gradcache.chunks import tensors
from mmkernels.gradcache.receivers import Collected, IntoGrad, Receiver
from mmkernels.gradcache.replay import RandomState, kept
from mmkernels.gradcache.step import Step
from mmkernels.gradcache.sync import Sync
from mmkernels.ops.checks import not_yet

__all__ = ["Deferred"]


class Deferred:
    """One step whose backward comes later.

    Args:
        inputs: one per encoder.
        modules: all that may run: those of the encoders and of the token loss.
        step: the step; None with automatic sizes.
        attempts: with automatic sizes, what makes steps, and makes another if memory runs out in the backward.
    """

    def __init__(
        self,
        inputs: Sequence[Any],
        modules: list[nn.Module],
        step: Step | None,
        attempts: Attempts | None,
    ) -> None:
        self._inputs, self._modules = inputs, modules
        self._step, self._attempts = step, attempts
        self._sync, self._autocast = Sync(modules), _autocast_now()
        self._syncing = self._sync.syncing()
        self._start: RandomState | None = None

    def forward(self) -> Any:
        """What `GradCache.__call__` returns, the loss with a graph."""
        graph = torch.is_grad_enabled()

        def begin(step: Step) -> Any:
            step.graph, step.later = graph, True
            self._start = RandomState.now({device for tower in step.towers for device in tower.devices})
            return step.begin()

        if self._attempts is None:
            assert self._step is not None
            step, result = self._step, begin(self._step)
        else:
            step, result = self._attempts.run(begin, gradients=False)
        if not graph or not step.trainable():
            return result
        self._step = step
        known = self._known(step)
        step.receiver = self._receiver(known)
        value, rest = (result[0], result[1:]) if isinstance(result, tuple) else (result, None)
        loss = _Loss.apply(self, value, torch.zeros((), requires_grad=True), *known)
        if rest is None:
            return loss
        return type(result)._make([loss, *rest]) if hasattr(result, "_make") else (loss, *rest)

    def _known(self, step: Step) -> list[Tensor]:
        """What autograd passes gradients on to; nothing if wrappers of encoders expect to see every chunk's."""
        own = step.own_leaves()
        if self._sync.fsdp and self._attempts is not None:
            sharded = {id(p) for p in self._attempts.shards.parameters()}
            if any(id(leaf) in sharded for leaf in own):
                not_yet("chunk_size", "auto, with as_loss and a loss that has parameters under fully_shard")
        if self._sync.ddp or self._sync.fsdp:
            return []
        parameters = (p for module in self._modules for p in module.parameters())
        known = itertools.chain(parameters, own, tensors(list(self._inputs)))
        return list({id(x): x for x in known if x.requires_grad}.values())

    def _receiver(self, known: list[Tensor]) -> Receiver:
        return IntoGrad() if self._sync.ddp or self._sync.fsdp else Collected(known)

    def backward(self, factor: Tensor) -> list[Tensor | None]:
        """The rest of the step; the gradients of what `forward` handed to autograd."""
        if self._step is None:
            raise RuntimeError(
                "GradCache.as_loss: expected one backward for each loss, got a second one: what the first has used is "
                "freed, whatever retain_graph is. Call the loss again."
            )
        step, attempts, self._step, self._attempts = self._step, self._attempts, None, None
        collected = step.receiver if isinstance(step.receiver, Collected) else None
        finish = self._finishing(step, factor, [] if collected is None else collected.known)
        with torch.enable_grad(), _autocast(self._autocast), self._sync.set_syncing(self._syncing):
            if attempts is None:
                finish(step)
            else:
                step, _ = attempts.run(finish, step, gradients=collected is None)
        self._inputs = ()  # a trainer may keep the loss for its log
        return step.receiver.take() if isinstance(step.receiver, Collected) else []

    def _finishing(self, begun: Step, factor: Tensor, known: list[Tensor]) -> Callable[[Step], None]:
        def finish(step: Step) -> None:
            if step is not begun:  # memory has run out: as if the forward had had chunks of these sizes
                assert self._start is not None
                step.receiver = self._receiver(known)
                with self._start.replayed(), kept(self._modules):
                    step.begin()
            step.scale_loss = lambda loss: loss * factor.to(loss)
            step.finish()

        return finish


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, deferred: Deferred, value: Tensor, anchor: Tensor, *known: Tensor) -> Tensor:
        """The anchor gives the loss a graph even where no parameter is known."""
        ctx.deferred, ctx.known = deferred, len(known)
        return value.clone()  # the trainer may change its loss in place, and that of `loss_fn` is needed as it is

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "GradCache.as_loss: expected a backward with create_graph=False, got create_graph=True: second "
                "derivatives would need the activations of the whole batch"
            )
        batched = torch._C._functorch.is_functorch_wrapped_tensor, torch._C._functorch.is_legacy_batchedtensor
        if any(is_one(factor) for is_one in batched):
            raise RuntimeError("GradCache.as_loss: expected one gradient of the loss, got a batch (is_grads_batched)")
        return None, None, None, *(ctx.deferred.backward(factor) or [None] * ctx.known)


def _autocast_now() -> dict[str, tuple[bool, torch.dtype, bool]]:
    """Of each kind of device: whether autocast is on, its dtype, whether it keeps cast weights."""
    cached = torch.is_autocast_cache_enabled()
    return {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), cached) for kind in ("cpu", "cuda")}


@contextmanager
def _autocast(state: dict[str, tuple[bool, torch.dtype, bool]]) -> Iterator[None]:
    """Inside, autocast is as it was."""
    with ExitStack() as stack:
        for kind, (enabled, dtype, cached) in state.items():
            if enabled or torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cached))
        yield
