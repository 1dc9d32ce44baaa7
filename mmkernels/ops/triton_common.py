"""Triton helpers shared by the families."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.runtime.backends import interpreting

INTERPRETING = tl.constexpr(interpreting())
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


def generation(device: torch.device) -> int:
    """Major compute capability, 8, 9 or 10; the interpreter counts as 9."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def unit_rows(x: Tensor) -> Tensor:
    """Kernels need a contiguous last dimension; other strides are arbitrary."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def block_dim(head_dim: int) -> int:
    """Head dim padded to a power of two; tensor cores need at least 16."""
    return max(16, triton.next_power_of_2(head_dim))


@triton.jit
def dot(a, b):
    """a @ b accumulated in float32: [M, K] x [K, N] -> [M, N].

    Float32 operands keep float32 accuracy (three tf32 products). The interpreter's bf16 `tl.dot` is silently wrong
    (triton #11584), and its float32 one has the error of the machine's BLAS, so the interpreter multiplies in float64
    and rounds once.
    """
    if INTERPRETING:
        return tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3" if a.dtype == tl.float32 else "tf32")


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x in another dtype, rounded to nearest even, NaN kept.

    The interpreter's float32 -> bfloat16 truncates, so under it the rounding is done here.
    """
    if INTERPRETING and x.dtype == tl.float32 and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def tanh(x):
    """tanh of float32, a few units in the last place: an odd polynomial near 0, where the exponential would cancel."""
    z = x * x
    p = -0.0062742396257817745 * z + 0.021071679890155792
    p = p * z - 0.05385230854153633
    p = p * z + 0.13332585990428925
    p = p * z - 0.33333316445350647
    far = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * (2.0 * LOG2_E)) + 1.0)
    return tl.where(tl.abs(x) < 0.55, x + x * (z * p), tl.where(x < 0, -far, far))


@triton.jit
def tanh_slope(x, b_tanh):
    """1 - tanh(x)^2 given tanh(x), without cancellation where that rounds to 1."""
    rest = 2.0 / (tl.exp2(tl.abs(x) * (2.0 * LOG2_E)) + 1.0)
    return tl.where(tl.abs(x) < 0.55, 1.0 - b_tanh * b_tanh, rest * (2.0 - rest))


@triton.jit
def larger(a, b):
    """The larger of two numbers, NaN if one is: `tl.maximum` alone drops it."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest_of(x, axis: tl.constexpr):
    """The largest along an axis, NaN if there is one: `tl.max` drops it. The interpreter would reduce one by one."""
    if INTERPRETING:
        return tl.max(x, axis) + tl.sum(tl.where(x == x, 0.0, x), axis)
    return tl.reduce(x, axis, larger)
