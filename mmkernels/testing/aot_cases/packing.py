"""Every Triton configuration of packing."""

from __future__ import annotations

from mmkernels.ops.packing import triton_bwd as packing_triton_bwd
from mmkernels.ops.packing import triton_fwd as packing_triton_fwd
from mmkernels.testing.aot import TritonCase

__all__ = ["aot_cases"]


def aot_cases() -> list[TritonCase]:
    """As its launchers launch them."""
    return [
        *packing_triton_fwd.aot_cases(),
        *packing_triton_bwd.aot_cases(),
    ]
