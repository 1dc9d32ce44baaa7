"""The epilogue of gated cross-attention: residual + tanh(gate) * branch, in one pass."""

from mmkernels.ops.attention.gate.api import gated_residual

__all__ = ["gated_residual"]
