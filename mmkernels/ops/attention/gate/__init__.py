"""The epilogue of gated cross-attention: a residual plus tanh(gate) times a branch, in one pass."""

from mmkernels.ops.attention.gate.api import gated_residual

__all__ = ["gated_residual"]
