"""The ops `mmkernels::attention_gated_residual_fwd` and `_bwd`: schema, fake, backward.

residual [N, C], x [N, C] -> out [N, C] in residual's dtype, contiguous. gate float32 (float64 for float64): [C] when it
goes by column, else [G], and row n reads gate[n % G].
"""

from __future__ import annotations

from typing import Any

import torch

from mmkernels.runtime.register import Op

from . import native, reference

__all__ = ["gated_residual_bwd_op", "gated_residual_fwd_op"]


def _triton_fwd(*args: Any) -> Any:
    from .triton_fwd import gated_residual_fwd

    return gated_residual_fwd(*args)


def _triton_bwd(*args: Any) -> Any:
    from .triton_bwd import gated_residual_bwd

    return gated_residual_bwd(*args)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, x, gate, *ctx.options = inputs
    ctx.save_for_backward(x, gate)


def _backward(ctx: Any, grad_out: torch.Tensor) -> tuple[Any, ...]:
    x, gate = ctx.saved_tensors
    return grad_out, *gated_residual_bwd_op(grad_out, x, gate, *ctx.options), None, None


gated_residual_bwd_op = Op(
    "attention_gated_residual_bwd",
    "(Tensor grad_out, Tensor x, Tensor gate, bool by_column, str backend) -> (Tensor, Tensor)",
    impls={"native": native.gated_residual_bwd, "triton": _triton_bwd, "reference": reference.gated_residual_bwd},
    fake=lambda grad_out, x, gate, *rest: (x.new_empty(x.shape), gate.new_empty(gate.shape)),
)

gated_residual_fwd_op = Op(
    "attention_gated_residual_fwd",
    "(Tensor residual, Tensor x, Tensor gate, bool by_column, str backend) -> Tensor",
    impls={"native": native.gated_residual_fwd, "triton": _triton_fwd, "reference": reference.gated_residual_fwd},
    fake=lambda residual, *rest: residual.new_empty(residual.shape),
    setup_context=_setup_context,
    backward=_backward,
)
