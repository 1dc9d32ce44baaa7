"""What every packing op is registered with: its backends' functions, each behind the check of its values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.checks import readable
from mmkernels.ops.packing import native, reference

__all__ = ["check_cu_seqlens", "check_index", "impls"]


def check_index(name: str, index: Tensor, rows: int) -> None:
    """Each entry in [-1, rows)."""
    if index.numel() == 0 or not readable(index):
        return
    low, high = (int(value) for value in torch.aminmax(index))
    if low < -1 or high >= rows:
        at = int(((index < -1) | (index >= rows)).nonzero()[0])
        raise ValueError(f"{name}: expected each in [-1, {rows}), got {int(index[at])} at position {at}")


def check_cu_seqlens(cu_seqlens: Tensor, rows: int) -> None:
    """From 0, not decreasing, within the rows."""
    if not readable(cu_seqlens):
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


def impls(name: str, direction: str, check: Callable[..., None]) -> dict[str, Callable[..., Any]]:
    """backend -> the function of that name, which runs after `check` of the same arguments."""

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
