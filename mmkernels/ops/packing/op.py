"""The packing ops: schema, fake, backward. Rows are 2-D here; api.py flattens trailing dimensions.

mmkernels::packing_gather_fwd        rows by index, -1 a row of zeros; backward is the scatter
mmkernels::packing_scatter_fwd       rows added by index, -1 left out; backward is the gather
mmkernels::packing_segment_pool_fwd  one row per segment (and the winners of "max")
mmkernels::packing_segment_pool_bwd
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from mmkernels.ops.packing import native, reference
from mmkernels.runtime.register import Op

__all__ = ["MODES", "gather", "scatter", "segment_pool", "segment_pool_bwd"]

MODES = ("sum", "mean", "max", "first")


def _checks_values(tensor: torch.Tensor) -> bool:
    """Whether to look into an index: always on CPU; on a GPU it would wait for the device, so only when asked to."""
    return tensor.device.type == "cpu" or os.environ.get("MMKERNELS_VALIDATE", "0") == "1"


def _check_index(index: torch.Tensor, rows: int) -> None:
    if index.numel() == 0 or not _checks_values(index):
        return
    low, high = (int(value) for value in torch.aminmax(index))
    if low < -1 or high >= rows:
        at = int(((index < -1) | (index >= rows)).nonzero()[0])
        raise ValueError(f"index: expected each in [-1, {rows}), got {int(index[at])} at position {at}")


def _check_cu_seqlens(cu_seqlens: torch.Tensor, rows: int) -> None:
    if not _checks_values(cu_seqlens):
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last > rows:
        raise ValueError(f"cu_seqlens: expected to begin with 0 and end within [0, {rows}], got {first} ... {last}")
    falls = cu_seqlens[1:] < cu_seqlens[:-1]
    if falls.any():
        at = int(falls.nonzero()[0])
        raise ValueError(
            f"cu_seqlens: expected not to decrease, got {int(cu_seqlens[at])}, {int(cu_seqlens[at + 1])} at {at}"
        )


def _triton(module: str, name: str) -> Callable[..., Any]:
    """A Triton launcher, imported when it is first called."""

    def launch(*args: Any) -> Any:
        from mmkernels.ops.packing import triton_bwd, triton_fwd

        return getattr({"fwd": triton_fwd, "bwd": triton_bwd}[module], name)(*args)

    return launch


def _impls(name: str, direction: str, check: Callable[..., None]) -> dict[str, Callable[..., Any]]:
    """The backends' functions of one name, each behind the check of its values."""

    def checked(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            check(*args)
            return function(*args)

        return run

    functions = {
        "native": getattr(native, name),
        "triton": _triton(direction, name),
        "reference": getattr(reference, name),
    }
    return {backend: checked(function) for backend, function in functions.items()}


def _gather_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    source, index, ctx.backend = inputs
    ctx.rows = source.shape[0]
    ctx.save_for_backward(index)


def _gather_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    (index,) = ctx.saved_tensors
    return scatter(grad, index, ctx.rows, ctx.backend), None, None


gather = Op(
    "packing_gather_fwd",
    "(Tensor source, Tensor index, str backend) -> Tensor",
    impls=_impls("gather", "fwd", lambda source, index: _check_index(index, source.shape[0])),
    fake=lambda source, index, backend: source.new_empty(index.shape[0], source.shape[1]),
    setup_context=_gather_context,
    backward=_gather_backward,
)


def _scatter_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, index, _, ctx.backend = inputs
    ctx.save_for_backward(index)


def _scatter_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    (index,) = ctx.saved_tensors
    return gather(grad, index, ctx.backend), None, None, None


scatter = Op(
    "packing_scatter_fwd",
    "(Tensor packed, Tensor index, SymInt rows, str backend) -> Tensor",
    impls=_impls("scatter", "bwd", lambda packed, index, rows: _check_index(index, rows)),
    fake=lambda packed, index, rows, backend: packed.new_empty(rows, packed.shape[1]),
    setup_context=_scatter_context,
    backward=_scatter_backward,
)


segment_pool_bwd = Op(
    "packing_segment_pool_bwd",
    "(Tensor grad_out, Tensor cu_seqlens, Tensor argmax, SymInt rows, str mode, str backend) -> Tensor",
    impls=_impls("segment_pool_bwd", "bwd", lambda grad, cu_seqlens, *rest: None),
    fake=lambda grad_out, cu_seqlens, argmax, rows, mode, backend: grad_out.new_empty(rows, grad_out.shape[1]),
)


def _pool_fake(x: torch.Tensor, cu_seqlens: torch.Tensor, mode: str, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    segments, width = cu_seqlens.shape[0] - 1, x.shape[1]
    return x.new_empty(segments, width), x.new_empty(segments if mode == "max" else 0, width, dtype=torch.int32)


def _pool_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, cu_seqlens, ctx.mode, ctx.backend = inputs
    ctx.rows = x.shape[0]
    ctx.save_for_backward(cu_seqlens, output[1])


def _pool_backward(ctx: Any, grad_out: torch.Tensor, _: Any) -> tuple[Any, ...]:
    cu_seqlens, argmax = ctx.saved_tensors
    return segment_pool_bwd(grad_out, cu_seqlens, argmax, ctx.rows, ctx.mode, ctx.backend), None, None, None


segment_pool = Op(
    "packing_segment_pool_fwd",
    "(Tensor x, Tensor cu_seqlens, str mode, str backend) -> (Tensor, Tensor)",
    impls=_impls("segment_pool", "fwd", lambda x, cu_seqlens, mode: _check_cu_seqlens(cu_seqlens, x.shape[0])),
    fake=_pool_fake,
    setup_context=_pool_context,
    backward=_pool_backward,
)
