"""The ops `mmkernels::attention_gated_residual_fwd`, `_bwd` and `_second`: schema, fake, backward.

residual [N, C], x [N, C] -> out [N, C] in residual's dtype, contiguous. gate float32 (float64 for float64): [C] when it
goes by column, else [G], and row n reads gate[n % G].
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmkernels.ops.attention.gate import native, reference
from mmkernels.ops.attention.gate.second import gated_residual_second
from mmkernels.runtime.backends import BACKENDS
from mmkernels.runtime.register import Op, Second

__all__ = ["gated_residual_bwd_op", "gated_residual_fwd_op", "gated_residual_second_op"]


def _triton_fwd(*args: Any) -> Any:
    from mmkernels.ops.attention.gate.triton_fwd import gated_residual_fwd

    return gated_residual_fwd(*args)


def _triton_bwd(*args: Any) -> Any:
    from mmkernels.ops.attention.gate.triton_bwd import gated_residual_bwd

    return gated_residual_bwd(*args)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, x, gate, *ctx.options = inputs
    ctx.save_for_backward(x, gate)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    x, gate = ctx.saved_tensors
    return grad_out, *gated_residual_bwd_op(grad_out, x, gate, *ctx.options), None, None


def _jvp(ctx: Any, residual: Any, x: Any, gate: Any, *_: Any) -> Tensor:
    moved = gated_residual_second_op(x, gate, None, *ctx.saved_tensors, *ctx.options)[0]
    return moved if residual is None else residual + moved.to(residual.dtype)


def _second_fake(tx: Any, tgate: Any, grad_out: Any, x: Tensor, gate: Tensor, *_: Any) -> Any:
    return x.new_empty(x.shape), *(t.new_empty(0 if grad_out is None else t.shape) for t in (x, gate))


gated_residual_second_op = Op(
    "attention_gated_residual_second",
    "(Tensor? tangent_x, Tensor? tangent_gate, Tensor? grad_out, Tensor x, Tensor gate, bool by_column, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    impls=dict.fromkeys(BACKENDS, gated_residual_second),
    fake=_second_fake,
)

gated_residual_bwd_op = Op(
    "attention_gated_residual_bwd",
    "(Tensor grad_out, Tensor x, Tensor gate, bool by_column, str backend) -> (Tensor, Tensor)",
    impls={"native": native.gated_residual_bwd, "triton": _triton_bwd, "reference": reference.gated_residual_bwd},
    fake=lambda grad_out, x, gate, *rest: (x.new_empty(x.shape), gate.new_empty(gate.shape)),
    second=Second(gated_residual_second_op, grads=1, wrt=(1, 2)),
)

gated_residual_fwd_op = Op(
    "attention_gated_residual_fwd",
    "(Tensor residual, Tensor x, Tensor gate, bool by_column, str backend) -> Tensor",
    impls={"native": native.gated_residual_fwd, "triton": _triton_fwd, "reference": reference.gated_residual_fwd},
    fake=lambda residual, *rest: residual.new_empty(residual.shape),
    setup_context=_setup_context,
    backward=_backward,
    jvp=_jvp,
)
