"""The ops `mmkernels::attention_additive_fwd`, `_bwd` and `_second`: schema, fake, backward.

q [Tq, H, D], k [Tk, Hkv, D], v [Tk, Hkv, Dv] -> out [Tq, H, Dv] in q's dtype, lse [H, Tq]. w, bias [H, D] and lse are
float32 (float64 for float64); the mask's tensors are int32, `reference.Visible`. A backend's dq is in w's dtype: the
bias's gradient is its sum over the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.attention.additive import native, reference
from mmkernels.ops.attention.additive.reference import Visible
from mmkernels.ops.attention.additive.second import additive_second
from mmkernels.ops.attention.flops import bwd_flops, fwd_flops, second_flops
from mmkernels.runtime.backends import BACKENDS
from mmkernels.runtime.register import Op, Second

__all__ = ["additive_bwd_op", "additive_fwd_op", "additive_second_op"]

_MASK = (
    "Tensor lo, Tensor hi, Tensor first_q, Tensor last_q,"
    " Tensor? span_q, Tensor? span_k, Tensor? allow_q, Tensor? bit_k"
)
_NUM_MASK = len(Visible._fields)


def _with_mask(run: Callable[..., Any]) -> Callable[..., Any]:
    """A backend's function, which takes a Visible, as one of the op's flat arguments."""
    return lambda *args: run(*args[:-_NUM_MASK], Visible(*args[-_NUM_MASK:]))


def _triton_fwd(*args: Any) -> Any:
    from mmkernels.ops.attention.additive.triton_fwd import additive_fwd

    return additive_fwd(*args)


def _triton_bwd(*args: Any) -> Any:
    from mmkernels.ops.attention.additive.triton_bwd import additive_bwd

    return additive_bwd(*args)


def _fwd_fake(q: Tensor, k: Tensor, v: Tensor, w: Tensor, *rest: Any) -> Any:
    return q.new_empty((q.shape[0], q.shape[1], v.shape[2])), w.new_empty((q.shape[1], q.shape[0]))


def _with_bias(run: Callable[..., Any]) -> Callable[..., Any]:
    """A backend's gradients, dq in q's dtype, and that of the bias."""

    def gradients(grad_out: Tensor, grad_lse: Any, q: Tensor, *args: Any) -> tuple[Tensor, ...]:
        dq, *others = run(grad_out, grad_lse, q, *args)
        return dq.to(q.dtype), *others, dq.sum(0)

    return gradients


def _bwd_fake(grad_out: Any, grad_lse: Any, *args: Tensor) -> Any:
    return tuple(x.new_empty(x.shape) for x in args[:5])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors[:5], *output, *tensors[5:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(saved[5])
    return *additive_bwd_op(grad_out, grad_lse, *saved, ctx.backend), *(None,) * (_NUM_MASK + 1)


def _jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
    made = additive_second_op(*tangents[:5], None, None, *ctx.saved_tensors, ctx.backend)
    return made[0], made[1]


def _without_outputs(run: Callable[..., Any]) -> Callable[..., Any]:
    """A function that computes out and lse, which come before the mask, anew."""
    return lambda *args: run(*args[:-3], args[-1])


def _second_fake(*args: Any) -> tuple[Tensor, ...]:
    grad_out, _, *inputs = args[5:12]
    grads = (x.new_empty(0 if grad_out is None else x.shape) for x in inputs)
    return *_fwd_fake(*inputs), *grads


_GRADIENTS = (
    "Tensor{} grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor w, Tensor bias, Tensor out, Tensor lse"
)

additive_second_op = Op(
    "attention_additive_second",
    "(Tensor? tangent_q, Tensor? tangent_k, Tensor? tangent_v, Tensor? tangent_w, Tensor? tangent_bias,"
    f" {_GRADIENTS.format('?')}, {_MASK}, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    impls=dict.fromkeys(BACKENDS, _with_mask(_without_outputs(additive_second))),
    fake=_second_fake,
    flops=lambda *args: second_flops(args[5], args[7], args[9], args[14 : 14 + _NUM_MASK]),
)

additive_bwd_op = Op(
    "attention_additive_bwd",
    f"({_GRADIENTS.format('')}, {_MASK}, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    impls={
        "native": _with_bias(_with_mask(native.additive_bwd)),
        "triton": _with_bias(_with_mask(_triton_bwd)),
        "reference": _with_bias(_with_mask(reference.additive_bwd)),
    },
    fake=_bwd_fake,
    flops=lambda *args: bwd_flops(args[2], args[4], args[9 : 9 + _NUM_MASK]),
    second=Second(additive_second_op, grads=2, wrt=(2, 3, 4, 5, 6)),
)

additive_fwd_op = Op(
    "attention_additive_fwd",
    f"(Tensor q, Tensor k, Tensor v, Tensor w, Tensor bias, {_MASK}, str backend) -> (Tensor, Tensor)",
    impls={
        "native": _with_mask(native.additive_fwd),
        "triton": _with_mask(_triton_fwd),
        "reference": _with_mask(reference.additive_fwd),
    },
    fake=_fwd_fake,
    setup_context=_setup_context,
    backward=_backward,
    jvp=_jvp,
    flops=lambda *args: fwd_flops(args[0], args[2], args[5 : 5 + _NUM_MASK]),
)
