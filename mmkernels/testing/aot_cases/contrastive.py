"""Every Triton configuration of contrastive."""

from __future__ import annotations

from mmkernels.ops.contrastive import triton_bwd as contrastive_triton_bwd
from mmkernels.ops.contrastive import triton_fwd as contrastive_triton_fwd
from mmkernels.testing.aot import TritonCase

__all__ = ["aot_cases"]


def aot_cases() -> list[TritonCase]:
    """As its launchers launch them."""
    return [
        *contrastive_triton_fwd.aot_cases(),
        *contrastive_triton_bwd.aot_cases(),
    ]
