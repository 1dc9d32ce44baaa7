"""Derivatives of the backward ops and of the second-derivative ops; register.py defines both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkernels.runtime.autograd import Derivatives, no_forward_mode
from mmkernels.runtime.signature import with_tensors, without_tensors
from mmkernels.runtime.torch_op import TorchOp

__all__ = ["Second", "of_backward", "of_second"]


class Second(NamedTuple):
    """The second derivatives that make a backward op differentiable: the op `mmkernels::<what>_second`.

    It takes a tangent for each output of the backward op (None: zero), then the arguments of the backward op, whose
    incoming gradients may be None. It returns tangents shaped like the incoming gradients, then like the outputs (empty
    without incoming gradients).

    Attributes:
        run: the function, plain PyTorch on every backend.
        fake: a function of the same arguments.
        grads: the backward op's incoming gradients, its first arguments.
        wrt: for each output, the argument whose gradient it is; a name that is not an argument gets none.
        flops: a function of the same arguments.
    """

    run: Callable[..., Any]
    fake: Callable[..., Any]
    grads: tuple[str, ...]
    wrt: tuple[str, ...]
    flops: Callable[..., int] | None = None


def _save_all(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors: list[Tensor] = []
    ctx.inputs = without_tensors(inputs, tensors)
    ctx.save_for_backward(*tensors)
    outputs = output if isinstance(output, tuple) else (output,)
    ctx.outputs = [{"size": x.shape, "dtype": x.dtype, "device": x.device} for x in outputs]
    ctx.set_materialize_grads(False)


def _inputs_of(ctx: Any) -> list[Any]:
    return list(with_tensors(ctx.inputs, iter(ctx.saved_tensors)))


def _needed(ctx: Any, inputs: list[Any], grads: Mapping[int, Tensor]) -> tuple[Any, ...]:
    """One gradient per input: those in `grads`, which maps an input's position to its gradient."""
    needed = (i in grads and isinstance(x, Tensor) and ctx.needs_input_grad[i] for i, x in enumerate(inputs))
    return tuple(grads[i].to(inputs[i].dtype) if need else None for i, need in enumerate(needed))


def of_backward(first: TorchOp, second: TorchOp, grads: int, wrt: Sequence[str]) -> Derivatives:
    """Derivatives of a backward op, whose first `grads` arguments are incoming gradients."""
    places = [first.signature.place.get(name) for name in wrt]

    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[Any, ...]:
        inputs = _inputs_of(ctx)
        # An output that was not needed is empty, and so is its incoming gradient.
        given = [None if t is None or t.numel() == 0 else t for t in tangents]
        moved = zip((*range(grads), *places), second.flat(*given, *inputs), strict=True)
        return _needed(ctx, inputs, {i: grad for i, grad in moved if i is not None})

    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        inputs = _inputs_of(ctx)
        incoming = [None if x is None else torch.zeros_like(x) for x in inputs[:grads]]
        incoming = [x if t is None else t for t, x in zip(tangents, incoming, strict=False)]
        linear = first.flat(*incoming, *inputs[grads:])
        along = [None if i is None else tangents[i] for i in places]
        moved = second.flat(*along, *inputs)[grads:]
        return tuple(a + b.to(a.dtype) if a.shape == b.shape else a for a, b in zip(linear, moved, strict=True))

    return Derivatives(_save_all, backward, jvp)


def of_second(first: TorchOp, second: TorchOp, grads: int, wrt: Sequence[str]) -> Derivatives:
    """Derivatives of the second-derivative op itself: reverse over forward mode."""
    count, places = len(wrt), [first.signature.place.get(name) for name in wrt]

    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Any, ...]:
        if any(g is not None and g.numel() for g in incoming[grads:]):
            raise NotImplementedError(
                f"mmkernels::{second.name} has no gradient: third derivatives, and autograd.functional.hvp, which asks "
                "for one, are not supported; torch.func.hessian and torch.autograd.functional.vhp are"
            )
        inputs = _inputs_of(ctx)
        like = zip(incoming, ctx.outputs[:grads], strict=False)
        given = [torch.zeros(**shape) if g is None else g for g, shape in like]
        along, saved = inputs[:count], inputs[count + grads :]
        of_tangents = first.flat(*given, *saved)
        of_inputs = second.flat(*along, *given, *saved)[grads:]
        made = dict(enumerate(of_tangents))
        made |= {count + i: grad for i, grad in zip(places, of_inputs, strict=True) if i is not None}
        return _needed(ctx, inputs, made)

    return Derivatives(_save_all, backward, no_forward_mode(second.name))
