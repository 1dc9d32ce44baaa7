"""Calls into the native core: allocates outputs and launches the CPU kernels; there is no CUDA C++ kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.runtime import native
from mmkernels.runtime.native import threads, unit_stride, view

__all__ = ["gated_residual_bwd", "gated_residual_fwd"]


def gated_residual_fwd(residual: Tensor, x: Tensor, gate: Tensor, by_column: bool) -> Tensor:
    """out [N, C]."""
    residual, x, gate = unit_stride(residual), unit_stride(x), gate.contiguous()
    out = residual.new_empty(residual.shape)
    native.core.launch_attention_gated_residual_fwd_cpu(
        view(residual), view(x), view(gate), by_column, view(out), threads()
    )
    return out


def gated_residual_bwd(grad_out: Tensor, x: Tensor, gate: Tensor, by_column: bool) -> tuple[Tensor, Tensor]:
    """dx [N, C] and dgate [G]."""
    grad_out, x, gate = unit_stride(grad_out), unit_stride(x), gate.contiguous()
    dx, dgate = x.new_empty(x.shape), torch.empty_like(gate)
    native.core.launch_attention_gated_residual_bwd_cpu(
        view(grad_out), view(x), view(gate), by_column, view(dx), view(dgate), threads()
    )
    return dx, dgate
