"""`gated_residual`: documentation, validation, routing."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.attention.gate.op import gated_residual_fwd
from mmkernels.ops.checks import FLOATING, dtype_names, expect_tensor, wrong_value
from mmkernels.ops.dtypes import compute_dtype
from mmkernels.runtime import backends

__all__ = ["gated_residual"]


def gated_residual(residual: Tensor, x: Tensor, gate: Tensor, *, backend: str | None = None) -> Tensor:
    """Add a branch to the residual stream through a learned gate, in one pass over memory.

        out = residual + tanh(gate) x

    With a gate of 0 the branch is closed: out is the residual. Arithmetic is float32 (float64 for float64), rounded
    once; the gradient of the gate is summed in a fixed order. Rows may have any stride as long as the last dimension is
    contiguous; otherwise a copy is made. Dtypes are kept under torch.autocast.

    Args:
        residual: [..., C]; float32, bfloat16, float16 or float64.
        x: residual's shape and dtype; with a float32 residual also bfloat16 or float16 (a layer's output under
            autocast).
        gate: float32 or x's dtype (float64 for float64), broadcast as in `tanh(gate) * x`: [] or [1], one gate; [C],
            one per channel; [H, 1], one per head, for x [..., H, C].
        backend: None picks the fastest one that supports the call; or "native", "triton", "reference".

    Returns:
        out, a new contiguous tensor of residual's shape and dtype.

    Raises:
        TypeError, ValueError: a wrong argument, by name, with what was expected and what came.
        BackendError: `backend` does not support this call.

    Source: Alayrac et al. 2022 (Flamingo).
    """
    _check(residual, x, gate)
    compute = compute_dtype(x.dtype)
    by_column = gate.ndim == 1 and gate.shape[0] == x.shape[-1] and gate.shape[0] != 1
    rows = (x.numel() // x.shape[-1] if x.shape[-1] else 0, x.shape[-1])
    limits = {"native": "gated_residual has no CUDA C++ kernel"} if x.device.type != "cpu" else None
    chosen = backends.resolve("attention", x, backend, limits)
    gates = gate.to(compute).reshape(-1)
    return gated_residual_fwd(residual.reshape(rows), x.reshape(rows), gates, by_column, chosen).view(x.shape)


def _check(residual: Tensor, x: Tensor, gate: Tensor) -> None:
    expect_tensor("residual", residual, "[..., C] floating point", dtypes=FLOATING)
    if residual.ndim < 1:
        wrong_value("residual", "at least one dimension", residual)
    low = (torch.bfloat16, torch.float16) if residual.dtype == torch.float32 else ()
    expected = f"{list(residual.shape)} {dtype_names(residual.dtype, *low)}"
    expect_tensor("x", x, expected, dtypes=(residual.dtype, *low), like=residual)
    if x.shape != residual.shape:
        wrong_value("x", expected, x)
    compute = compute_dtype(x.dtype)
    C = x.shape[-1]
    heads = f", or [{x.shape[-2]}, 1]" if x.ndim > 1 else ""
    expected = f"[], [1] or [{C}]{heads} {dtype_names(compute, x.dtype)}"
    expect_tensor("gate", gate, expected, dtypes=(compute, x.dtype), like=x)
    allowed: list[tuple[int, ...]] = [(), (1,), (C,)]
    if x.ndim > 1:
        allowed.append((x.shape[-2], 1))
    if tuple(gate.shape) not in allowed:
        wrong_value("gate", expected, gate)
