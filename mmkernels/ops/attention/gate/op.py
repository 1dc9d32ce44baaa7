"""The ops `mmkernels::attention_gated_residual_fwd`, `_bwd` and `_second`: arguments, shapes, derivatives.

residual [N, C], x [N, C] -> out [N, C] in residual's dtype, contiguous. gate float32 (float64 for float64): [C] if
by_column; otherwise [G], and row n reads gate[n % G].
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmkernels.ops.attention.gate import native, reference
from mmkernels.ops.attention.gate.second import gated_residual_second
from mmkernels.runtime.register import Context, Op, Second, on_triton

__all__ = ["gated_residual_bwd", "gated_residual_fwd"]


def _fwd_fake(residual: Tensor, x: Tensor, gate: Tensor, by_column: bool) -> Tensor:
    return residual.new_empty(residual.shape)


def _bwd_fake(grad_out: Tensor, x: Tensor, gate: Tensor, by_column: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), gate.new_empty(gate.shape)


def _second_fake(
    tangent_x: Any, tangent_gate: Any, grad_out: Tensor | None, x: Tensor, gate: Tensor, by_column: bool
) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), *(t.new_empty(0 if grad_out is None else t.shape) for t in (x, gate))


gated_residual_bwd = Op(
    "attention_gated_residual_bwd",
    fake=_bwd_fake,
    impls={
        "native": native.gated_residual_bwd,
        "triton": on_triton("mmkernels.ops.attention.gate.triton_bwd", "gated_residual_bwd"),
        "reference": reference.gated_residual_bwd,
    },
    second=Second(gated_residual_second, _second_fake, grads=("grad_out",), wrt=("x", "gate")),
)


def _save(inputs: Any, outputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    return inputs.x, inputs.gate, inputs.by_column


def _backward(ctx: Context, grad_out: Tensor) -> dict[str, Tensor]:
    dx, dgate = gated_residual_bwd(grad_out, *ctx.saved, ctx.backend)
    return {"residual": grad_out, "x": dx, "gate": dgate}


def _jvp(ctx: Context, residual: Any, x: Any, gate: Any, by_column: None) -> Tensor:
    moved: Tensor = gated_residual_bwd.second(x, gate, None, *ctx.saved, ctx.backend)[0]
    return moved if residual is None else residual + moved.to(residual.dtype)


gated_residual_fwd = Op(
    "attention_gated_residual_fwd",
    fake=_fwd_fake,
    impls={
        "native": native.gated_residual_fwd,
        "triton": on_triton("mmkernels.ops.attention.gate.triton_fwd", "gated_residual_fwd"),
        "reference": reference.gated_residual_fwd,
    },
    save=_save,
    backward=_backward,
    jvp=_jvp,
)
