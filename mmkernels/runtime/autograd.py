"""Adapts an op's formulas over grouped arguments to the flat ones that autograd, functorch and vmap pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmkernels.runtime.signature import Signature, with_tensors, without_tensors

__all__ = ["Context", "Derivatives", "Formulas", "functions", "refusal"]


class Context(NamedTuple):
    """What the derivative formulas know about the forward.

    Attributes:
        saved: what the op's `save` returned.
        needs: names of the arguments that need a gradient.
        backend: the backend of the forward.
    """

    saved: Any
    needs: frozenset[str]
    backend: str


class Derivatives(NamedTuple):
    """The functions autograd calls with the torch op's flat arguments; backward returns one gradient for each."""

    setup_context: Callable[..., None]
    backward: Callable[..., Any]
    jvp: Callable[..., Any]


def refusal(why: str) -> Callable[..., Any]:
    """A formula that raises, for an op without one."""

    def refuse(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(why)

    return refuse


class Formulas:
    """An op's `save`, `backward` and `jvp` (register.Op), over flat arguments."""

    def __init__(
        self,
        name: str,
        signature: Signature,
        save: Callable[..., tuple[Any, ...]] | None,
        backward: Callable[..., Mapping[str, Tensor | None]] | None,
        jvp: Callable[..., Any] | None,
        constant_outputs: int,
    ) -> None:
        self._signature, self._save, self._constant_outputs = signature, save, constant_outputs
        self._backward = backward or refusal(f"mmkernels::{name} has no gradient formula")
        self._jvp = jvp or no_forward_mode(name)

    def derivatives(self) -> Derivatives:
        return Derivatives(self._setup_context, self._flat_backward, self._flat_jvp)

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        if self._constant_outputs:
            ctx.mark_non_differentiable(*outputs[-self._constant_outputs :])
        ctx.set_materialize_grads(False)
        ctx.backend = inputs[-1]
        if self._save is not None:
            tensors: list[Tensor] = []
            given = self._signature.inputs(*self._signature.group(*inputs))
            ctx.saved = without_tensors(self._save(given, outputs), tensors)
            ctx.save_for_backward(*tensors)

    def _context(self, ctx: Any, needs: frozenset[str]) -> Context:
        saved = with_tensors(ctx.saved, iter(ctx.saved_tensors)) if self._save is not None else ()
        return Context(saved, needs, ctx.backend)

    def _flat_backward(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        names = self._signature.names
        made: list[Tensor | None] = [None] * (len(names) + 1)
        grads = grads[: self._signature.outputs - self._constant_outputs]
        if any(grad is not None for grad in grads):
            needs = frozenset(compress(names, ctx.needs_input_grad))
            for name, grad in self._backward(self._context(ctx, needs), *grads).items():
                made[self._signature.place[name]] = grad if name in needs else None
        return tuple(made)

    def _flat_jvp(self, ctx: Any, *tangents: Any) -> Any:
        moved = self._jvp(self._context(ctx, frozenset()), *self._signature.group(*tangents))
        if not self._constant_outputs:
            return moved
        return *(moved if isinstance(moved, tuple) else (moved,)), *(None,) * self._constant_outputs


def no_forward_mode(name: str) -> Callable[..., Any]:
    return refusal(f"mmkernels::{name} has no forward-mode formula (torch.func.jvp, jacfwd, forward_ad)")


def functions(
    name: str, run: Callable[..., Any], derivatives: Derivatives
) -> tuple[type[torch.autograd.Function], type[torch.autograd.Function]]:
    """The two autograd.Functions of an op: a fast one, and one that functorch transforms support."""

    class Fast(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = run(*args)
            derivatives.setup_context(ctx, args, output)
            if forward_ad._current_level >= 0:
                _save_for_forward(ctx)
            return output

    class Functorch(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return run(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            derivatives.setup_context(ctx, inputs, output)
            _save_for_forward(ctx)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
            return _loop_over_batch(Functorch.apply, info.batch_size, in_dims, args)

    for function in (Fast, Functorch):
        function.backward = staticmethod(derivatives.backward)  # type: ignore[method-assign]
        function.jvp = staticmethod(derivatives.jvp)  # type: ignore[method-assign]
    Fast.__name__, Functorch.__name__ = name, f"{name}_functorch"
    return Fast, Functorch


def _save_for_forward(ctx: Any) -> None:
    """jvp needs what backward needs."""
    ctx.save_for_forward(*(getattr(ctx, "to_save", None) or ()))


def _loop_over_batch(
    call: Callable[..., Any], batch_size: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]
) -> tuple[Any, Any]:
    """vmap as a loop: one sample already fills the machine, so batching would gain nothing."""
    rows = []
    for i in range(max(batch_size, 1)):  # an empty batch takes its shapes from one sample of zeros
        sliced = []
        for a, dim in zip(args, in_dims, strict=True):
            if dim is not None:
                a = a.select(dim, i) if batch_size else a.new_zeros(a.shape[:dim] + a.shape[dim + 1 :])
            sliced.append(a)
        rows.append(call(*sliced))
    if isinstance(rows[0], Tensor):
        return torch.stack(rows)[:batch_size], 0
    outputs = tuple(torch.stack(column)[:batch_size] for column in zip(*rows, strict=True))
    return outputs, (0,) * len(outputs)
