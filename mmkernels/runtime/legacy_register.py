"""One helper: schema + fake + implementations + autograd -> torch op.

An op here has one schema whose last argument names the backend, and one implementation per backend with the same
arguments less that one. `Op.__call__` takes the cheapest road that differentiates:

    being compiled          the bare op (AOTAutograd uses its registered formula)
    functorch transform     an autograd.Function with setup_context (registered formulas fail under torch.func.grad)
    gradient needed         an autograd.Function whose forward takes ctx
    otherwise               the op below autograd

`torch.ops.mmkernels.*` differentiates too, in reverse mode. A derivative is made of ops again, never of plain code over
detached tensors, so that it can be differentiated in its turn:

    f_fwd       y = f(x)
    f_bwd       (g, x) -> the gradient of <g, f(x)> by x
    f_second    (t, g, x) -> along the tangents t of x, the tangents of y and of that gradient

The tangent of y is forward mode, and also the gradient of <t, f_bwd> by g. The Hessian of <g, f(x)> is symmetric: its
product with t is the tangent of f_bwd, and also the gradient of <t, f_bwd> by x. In reverse over forward mode, where g
comes in for the tangent of y, that tangent has the gradients f_bwd by t and f_second by x. Third derivatives raise.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmkernels.runtime.flops import register_flops

__all__ = ["Op", "Second"]

_library = torch.library.Library("mmkernels", "FRAGMENT")


class _Below(threading.local):
    """Whether this thread is in an op that one of the autograd.Functions below has called."""

    autograd = False


_below = _Below()


class Second(NamedTuple):
    """What makes a backward op differentiable: the op of the second derivatives, which becomes so itself.

    Attributes:
        op: takes a tangent for each output of the backward op (None: zero), then that op's own arguments, of which
            the incoming gradients may be None; gives tangents like the incoming gradients, then like the outputs
            (empty without incoming gradients).
        grads: how many of the backward op's arguments, the first, are incoming gradients.
        wrt: for each of its outputs, which argument it is the gradient of; None for one that it does not need.
    """

    op: Op
    grads: int
    wrt: tuple[int | None, ...]


class Op:
    """A torch op `mmkernels::<name>` that differentiates.

    Args:
        name: `<family>_<what>_fwd`, `_bwd` or `_second`.
        schema: `(Tensor x, ..., str backend) -> ...`; the backend comes last.
        impls: backend -> function of the arguments without `backend`.
        fake: function of all arguments that gives outputs of the right shape, stride and dtype.
        setup_context: `(ctx, inputs, output)`; saves what backward needs.
        backward: `(ctx, *grad_outputs)` -> one gradient per input, `backend` included. Without it the op has no
            gradient, and asking for one raises.
        jvp: `(ctx, *tangents)`, None for an input without -> one tangent per output; ctx has what setup_context saved.
            Without it forward mode raises.
        second: makes the three for a backward op.
        flops: what FlopCounterMode counts, from all arguments: 2 FLOP for each multiply-add of the products, over the
            pairs that are seen. Without it nothing.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        impls: Mapping[str, Callable[..., Any]],
        fake: Callable[..., Any],
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
        jvp: Callable[..., Any] | None = None,
        second: Second | None = None,
        flops: Callable[..., int] | None = None,
    ) -> None:
        self.name = name
        self.impls = dict(impls)
        # A tangent that a bare op meets would be lost without a word.
        self._no_forward_mode = (
            f"torch.ops.mmkernels.{name} has no forward mode, neither bare nor inside torch.compile "
            "(torch.func.jvp, jacfwd, forward_ad); the functions of mmkernels have, outside of it"
        )
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        # Explicit device keys: a CompositeExplicitAutograd kernel would be traced instead of the fake.
        for key in ("CPU", "CUDA"):
            _library.impl(name, self._run, key)
        torch.library.register_fake(f"mmkernels::{name}", fake, lib=_library)
        self._op = getattr(torch.ops.mmkernels, name).default
        if flops is not None:
            register_flops(getattr(torch.ops.mmkernels, name), flops)
        self._reverse_over_forward = _refusal(f"mmkernels::{name} has no gradient formula")
        if second is not None:
            setup_context, backward, jvp = _twice(self, second)
        setup_context = setup_context or (_save_all if name.endswith("_second") else _save_nothing)
        backward = backward or (lambda ctx, *grads: self._reverse_over_forward(ctx, *grads))
        jvp = jvp or _refusal(f"mmkernels::{name} has no forward-mode formula (torch.func.jvp, jacfwd, forward_ad)")
        torch.library.register_autograd(f"mmkernels::{name}", backward, setup_context=setup_context, lib=_library)
        self._fast, self._functorch = _functions(name, self._below_autograd, setup_context, backward, jvp)

    def _run(self, *args: Any) -> Any:
        if forward_ad._current_level >= 0 and not _below.autograd:
            raise NotImplementedError(self._no_forward_mode)
        return self.impls[args[-1]](*args[:-1])

    def _below_autograd(self, *args: Any) -> Any:
        outer, _below.autograd = _below.autograd, True
        try:
            with torch._C._AutoDispatchBelowAutograd():
                return self._op(*args)
        finally:
            _below.autograd = outer

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            if forward_ad._current_level >= 0:
                raise NotImplementedError(self._no_forward_mode)
            return self._op(*args)
        if torch._C._are_functorch_transforms_active():
            return self._functorch.apply(*args)
        if forward_ad._current_level >= 0:
            return self._fast.apply(*args)
        if torch.is_grad_enabled():
            for arg in args:
                if isinstance(arg, Tensor) and arg.requires_grad:
                    return self._fast.apply(*args)
        if type(args[0]) is Tensor:
            return self._below_autograd(*args)
        return self._op(*args)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _save_all(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.inputs = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.tensors = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
    ctx.save_for_backward(*(inputs[i] for i in ctx.tensors))
    outputs = output if isinstance(output, tuple) else (output,)
    ctx.outputs = [{"size": x.shape, "dtype": x.dtype, "device": x.device} for x in outputs]
    ctx.set_materialize_grads(False)


def _inputs_of(ctx: Any) -> list[Any]:
    inputs = list(ctx.inputs)
    for i, tensor in zip(ctx.tensors, ctx.saved_tensors, strict=True):
        inputs[i] = tensor
    return inputs


def _needed(ctx: Any, inputs: list[Any], grads: Mapping[int, Tensor]) -> tuple[Any, ...]:
    """One gradient per input, of those at these places."""
    needed = (i in grads and isinstance(x, Tensor) and ctx.needs_input_grad[i] for i, x in enumerate(inputs))
    return tuple(grads[i].to(inputs[i].dtype) if need else None for i, need in enumerate(needed))


def _twice(first: Op, second: Second) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """setup_context, backward and jvp of a backward op; the op of second derivatives gets its backward."""

    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[Any, ...]:
        inputs = _inputs_of(ctx)
        # An output that nobody needed is empty, and so is what comes in for it.
        given = [None if t is None or t.numel() == 0 else t for t in tangents]
        places = (*range(second.grads), *second.wrt)
        moved = zip(places, second.op(*given, *inputs), strict=True)
        return _needed(ctx, inputs, {i: grad for i, grad in moved if i is not None})

    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        inputs = _inputs_of(ctx)
        incoming = [None if x is None else torch.zeros_like(x) for x in inputs[: second.grads]]
        incoming = [x if t is None else t for t, x in zip(tangents, incoming, strict=False)]
        linear = first(*incoming, *inputs[second.grads :])
        along = [None if i is None else tangents[i] for i in second.wrt]
        moved = second.op(*along, *inputs)[second.grads :]
        return tuple(a + b.to(a.dtype) if a.shape == b.shape else a for a, b in zip(linear, moved, strict=True))

    def reverse_over_forward(ctx: Any, *incoming: Tensor | None) -> tuple[Any, ...]:
        if any(g is not None and g.numel() for g in incoming[second.grads :]):
            raise NotImplementedError(_no_third(second.op.name))
        inputs, count = _inputs_of(ctx), len(second.wrt)
        like = zip(incoming, ctx.outputs[: second.grads], strict=False)
        given = [torch.zeros(**shape) if g is None else g for g, shape in like]
        along, saved = inputs[:count], inputs[count + second.grads :]
        of_tangents = first(*given, *saved)
        of_inputs = second.op(*along, *given, *saved)[second.grads :]
        grads = dict(enumerate(of_tangents))
        grads |= {count + i: grad for i, grad in zip(second.wrt, of_inputs, strict=True) if i is not None}
        return _needed(ctx, inputs, grads)

    second.op._reverse_over_forward = reverse_over_forward
    return _save_all, backward, jvp


def _no_third(name: str) -> str:
    return (
        f"mmkernels::{name} has no gradient: third derivatives, and autograd.functional.hvp, which asks for one, are "
        "not supported; torch.func.hessian and torch.autograd.functional.vhp are"
    )


def _refusal(why: str) -> Callable[..., Any]:
    def refuse(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(why)

    return refuse


def _functions(
    name: str,
    run: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    jvp: Callable[..., Any],
) -> tuple[type[torch.autograd.Function], type[torch.autograd.Function]]:
    """The two autograd.Functions of an op: the quick one, and the one that functorch can see through."""

    class Fast(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = run(*args)
            setup_context(ctx, args, output)
            if forward_ad._current_level >= 0:
                _save_for_forward(ctx)
            return output

    class Functorch(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return run(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            setup_context(ctx, inputs, output)
            _save_for_forward(ctx)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
            return _loop_over_batch(Functorch.apply, info.batch_size, in_dims, args)

    for function in (Fast, Functorch):
        function.backward, function.jvp = staticmethod(backward), staticmethod(jvp)  # type: ignore[method-assign]
    Fast.__name__, Functorch.__name__ = name, f"{name}_functorch"
    return Fast, Functorch


def _save_for_forward(ctx: Any) -> None:
    """What backward needs, jvp needs."""
    ctx.save_for_forward(*(getattr(ctx, "to_save", None) or ()))


def _loop_over_batch(
    call: Callable[..., Any], batch_size: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]
) -> tuple[Any, Any]:
    """vmap by a loop: these kernels fill the machine with one sample, so there is nothing to gain from batching."""
    rows = []
    for i in range(max(batch_size, 1)):  # of no samples one that is all zeros has the shapes
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
