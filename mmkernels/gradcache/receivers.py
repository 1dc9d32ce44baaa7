"""Where the gradients of a step go: into `.grad`, into sums that a trainer's own backward passes on, or through a
backward that the trainer owns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mmkernels.gradcache.backward import Undo, autocast_off, backward, leaves

__all__ = ["ByTrainer", "Collected", "IntoGrad", "Receiver"]


class Receiver(Protocol):
    def __call__(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor | None], undo: Undo | None) -> bool:
        """Backward from the outputs that have a graph; False if none has one."""

    def of_loss(self, loss: Tensor, embeddings: Sequence[Tensor], undo: Undo | None) -> bool:
        """Backward of the loss, into `.grad` of the embeddings, which are leaves; False if it has no graph."""


class IntoGrad:
    """Adds to `.grad`, as `Tensor.backward` does."""

    def __call__(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor | None], undo: Undo | None) -> bool:
        return backward(outputs, gradients, undo)

    def of_loss(self, loss: Tensor, embeddings: Sequence[Tensor], undo: Undo | None) -> bool:
        return backward([loss], [None], undo)


class Collected:
    """Adds up beside `.grad`: one gradient per tensor, however many chunks there are.

    Args:
        known: leaves, and tensors where backward ends that have a graph of their own (inputs made by other modules).
            Other leaves, found on the way, get their gradient in `.grad`.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        self.known = list({id(leaf): leaf for leaf in known}.values())
        self._ids = {id(leaf) for leaf in self.known}
        self._ends = {(x.grad_fn, x.output_nr): x for x in self.known if x.grad_fn is not None}
        self._sums: dict[int, Tensor] = {}
        self._owned: set[int] = set()  # sums that no one else holds

    def __call__(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor | None], undo: Undo | None) -> bool:
        live = [i for i, out in enumerate(outputs) if out.requires_grad]
        if not live:
            return False
        reached = list({id(leaf): leaf for i in live for leaf in leaves(outputs[i], self._ends)}.values())
        with autocast_off():
            found = torch.autograd.grad(
                [outputs[i] for i in live], reached, [gradients[i] for i in live], allow_unused=True
            )
        for leaf, grad in zip(reached, found, strict=True):
            if grad is not None and id(leaf) in self._ids:
                self._add(id(leaf), grad)
            elif grad is not None:
                backward([leaf], [grad], undo)
        return True

    def of_loss(self, loss: Tensor, embeddings: Sequence[Tensor], undo: Undo | None) -> bool:
        return self([loss], [None], undo)

    def _add(self, key: int, grad: Tensor) -> None:
        """In the order and arithmetic of `.grad`; never into what autograd returned, which may be shared or
        expanded."""
        if key not in self._sums:
            self._sums[key] = grad
        elif key in self._owned and not self._sums[key].is_sparse:
            self._sums[key] += grad
        else:
            self._sums[key] = self._sums[key] + grad
            self._owned.add(key)

    def take(self) -> list[Tensor | None]:
        """The gradient of each known leaf, None where nothing has reached it."""
        sums, self._sums, self._owned = self._sums, {}, set()
        return [sums.pop(id(leaf), None) for leaf in self.known]


class ByTrainer:
    """Calls a trainer's own backward with scalars `sum <output, gradient>`, whose gradient is the one wanted.

    The trainer may multiply every such scalar by a factor, so that nothing may go through it twice: the gradient of the
    embeddings is computed without it.

    Args:
        function: `scalar -> anything`; runs the scalar's backward.
    """

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        self._function = function

    def __call__(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor | None], undo: Undo | None) -> bool:
        pairs = [(out, grad) for out, grad in zip(outputs, gradients, strict=True) if out.requires_grad]
        if not pairs:
            return False
        if undo is not None:
            undo.keep(leaf for out, _ in pairs for leaf in leaves(out))
        ran: list[bool] = []
        with autocast_off():
            parts = [out.sum() if grad is None else _product(out, grad) for out, grad in pairs]
            scalar = torch.stack([part.to(parts[0].device, parts[0].dtype) for part in parts]).sum()
            scalar.register_hook(lambda _: ran.append(True))
            self._function(scalar)
        if not ran:
            raise RuntimeError(
                "backward: expected a function that runs the backward of the loss that it is given, got one that did "
                "not: no gradient has arrived"
            )
        return True

    def of_loss(self, loss: Tensor, embeddings: Sequence[Tensor], undo: Undo | None) -> bool:
        if not loss.requires_grad:
            return False
        reached = leaves(loss)
        with autocast_off():
            found = torch.autograd.grad(loss, reached, allow_unused=True)
        own = {id(rows) for rows in embeddings}
        others: list[tuple[Tensor, Tensor]] = []
        for leaf, grad in zip(reached, found, strict=True):
            if id(leaf) in own:
                leaf.grad = grad
            elif grad is not None:
                others.append((leaf, grad))
        if others:
            self([leaf for leaf, _ in others], [grad for _, grad in others], undo)
        return True


def _product(output: Tensor, gradient: Tensor) -> Tensor:
    """In float32 at least: a trainer that scales its loss would overflow a sum in float16."""
    wide = torch.promote_types(output.dtype, torch.float32)
    return (output.to(wide) * gradient.to(wide)).sum()
