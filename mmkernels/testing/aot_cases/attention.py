"""Every Triton configuration of attention."""

from __future__ import annotations

from mmkernels.ops.attention import triton_bwd as attention_triton_bwd
from mmkernels.ops.attention import triton_fwd as attention_triton_fwd
from mmkernels.ops.attention.additive import triton_bwd as additive_triton_bwd
from mmkernels.ops.attention.additive import triton_fwd as additive_triton_fwd
from mmkernels.ops.attention.gate import triton_bwd as gate_triton_bwd
from mmkernels.ops.attention.gate import triton_fwd as gate_triton_fwd
from mmkernels.ops.attention.rope import triton_bwd as rope_triton_bwd
from mmkernels.ops.attention.rope import triton_fwd as rope_triton_fwd
from mmkernels.testing.aot import TritonCase

__all__ = ["aot_cases"]


def aot_cases() -> list[TritonCase]:
    """As its launchers launch them."""
    return [
        *attention_triton_fwd.aot_cases(),
        *attention_triton_bwd.aot_cases(),
        *additive_triton_fwd.aot_cases(),
        *additive_triton_bwd.aot_cases(),
        *gate_triton_fwd.aot_cases(),
        *gate_triton_bwd.aot_cases(),
        *rope_triton_fwd.aot_cases(),
        *rope_triton_bwd.aot_cases(),
    ]
