"""Forward of additive attention in Triton.

A program owns BLOCK_M queries of one head and walks the hull of their keys, BLOCK_N at a time, with the online softmax
in units of log2. A tile of scores [BLOCK_M, BLOCK_N] is summed over the head dim one element after the other: the outer
sum of a column of q and a column of k, its tanh, times a scalar of w. The columns of a tile stay in the L1 cache; the
tanh is what costs. All arithmetic is float32; probabilities are rounded to the input's dtype for the product with v.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.attention.types import Visible
from mmkernels.ops.triton_common import LN_2, LOG2_E, cast, dot, tanh

if TYPE_CHECKING:
    from mmkernels.testing.aot import TritonCase

__all__ = ["additive_fwd", "aot_cases"]

NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def load_rows(base_ptr, o_t, o_d, stride_t, T, D: tl.constexpr):
    """Rows o_t of a [T, D] matrix, zeros outside: [len(o_t), len(o_d)]."""
    p = base_ptr + o_t.to(tl.int64)[:, None] * stride_t + o_d[None, :]
    return tl.load(p, mask=(o_t < T)[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def load_column(base_ptr, o_t, i_d, stride_t, T):
    """Element i_d of the rows o_t in float32: [len(o_t)]."""
    return tl.load(base_ptr + o_t.to(tl.int64) * stride_t + i_d, mask=o_t < T, other=0.0).to(tl.float32)


@triton.jit
def tanh_tile(q_ptr, k_ptr, bias_ptr, o_m, o_n, i_d, stride_qt, stride_kt, Tq, Tk):
    """tanh(q + k + bias) of one element of the head dim: [BLOCK_M, BLOCK_N]."""
    b_q = load_column(q_ptr, o_m, i_d, stride_qt, Tq) + tl.load(bias_ptr + i_d)
    return tanh(b_q[:, None] + load_column(k_ptr, o_n, i_d, stride_kt, Tk)[None, :])


@triton.jit
def scores(
    q_ptr, k_ptr, w_ptr, bias_ptr, o_m, o_n, stride_qt, stride_kt, Tq, Tk,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N]"""
    b_s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_d in range(0, D):
        b_t = tanh_tile(q_ptr, k_ptr, bias_ptr, o_m, o_n, i_d, stride_qt, stride_kt, Tq, Tk)
        b_s += tl.load(w_ptr + i_d) * b_t
    return b_s


@triton.jit
def visible(
    lo_ptr, hi_ptr, span_q_ptr, span_k_ptr, allow_q_ptr, bit_k_ptr, o_m, o_n, Tq, Tk, PATTERN: tl.constexpr
):  # fmt: skip
    """Which of the tile's pairs see each other: [BLOCK_M, BLOCK_N]."""
    m_m, m_n = o_m < Tq, o_n < Tk
    b_lo = tl.load(lo_ptr + o_m, mask=m_m, other=0)
    b_hi = tl.load(hi_ptr + o_m, mask=m_m, other=0)
    m = (b_lo[:, None] <= o_n[None, :]) & (o_n[None, :] < b_hi[:, None]) & m_n[None, :]
    if PATTERN:
        b_span_q = tl.load(span_q_ptr + o_m, mask=m_m, other=0)
        b_span_k = tl.load(span_k_ptr + o_n, mask=m_n, other=0)
        b_allow = tl.load(allow_q_ptr + o_m, mask=m_m, other=0)
        b_bit = tl.load(bit_k_ptr + o_n, mask=m_n, other=0)
        m = m & ((b_span_q[:, None] == b_span_k[None, :]) | ((b_allow[:, None] & b_bit[None, :]) != 0))
    return m


@triton.jit
def hull(first_ptr, last_ptr, o, T, limit):
    """Bounds of the union of the intervals of rows o, inside [0, limit]."""
    b_first = tl.maximum(tl.load(first_ptr + o, mask=o < T, other=0), 0)
    b_last = tl.minimum(tl.load(last_ptr + o, mask=o < T, other=0), limit)
    begin = tl.min(tl.where(b_first < b_last, b_first, NOWHERE), 0)
    return begin, tl.max(tl.where(b_first < b_last, b_last, 0), 0)


@triton.jit
def _additive_fwd_kernel(
    q_ptr, k_ptr, v_ptr, w_ptr, bias_ptr, lo_ptr, hi_ptr, span_q_ptr, span_k_ptr, allow_q_ptr, bit_k_ptr,
    out_ptr, lse_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, Tq, Tk, heads, group,
    D: tl.constexpr, DV: tl.constexpr, PATTERN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    i_h = tl.program_id(1).to(tl.int64)
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_dv = tl.arange(0, BLOCK_DV)
    q_ptr += i_h * stride_qh
    k_ptr += i_h // group * stride_kh
    v_ptr += i_h // group * stride_vh
    w_ptr += i_h * D
    bias_ptr += i_h * D
    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    begin, end = hull(lo_ptr, hi_ptr, o_m, Tq, Tk)
    for start in range(begin, end, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        b_s = scores(
            q_ptr, k_ptr, w_ptr, bias_ptr, o_m, o_n, stride_qt, stride_kt, Tq, Tk, D, BLOCK_M, BLOCK_N
        )  # fmt: skip
        m = visible(lo_ptr, hi_ptr, span_q_ptr, span_k_ptr, allow_q_ptr, bit_k_ptr, o_m, o_n, Tq, Tk, PATTERN)
        b_s = tl.where(m, b_s * LOG2_E, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        # A row that has seen nothing yet keeps -inf; subtracting 0 instead leaves its exponents at -inf.
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.exp2(b_s - b_shift[:, None])  # [BLOCK_M, BLOCK_N]
        b_rescale = tl.exp2(b_max - b_shift)
        b_v = load_rows(v_ptr, o_n, o_dv, stride_vt, Tk, DV)  # [BLOCK_N, BLOCK_DV]
        b_acc = b_acc * b_rescale[:, None] + dot(cast(b_p, b_v.dtype), b_v)
        b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
        b_max = b_new
    m_empty = b_sum == 0.0
    b_total = tl.where(m_empty, 1.0, b_sum)
    p_out = out_ptr + (o_m.to(tl.int64)[:, None] * heads + i_h) * DV + o_dv[None, :]
    m_out = (o_m < Tq)[:, None] & (o_dv < DV)[None, :]
    tl.store(p_out, cast(b_acc / b_total[:, None], out_ptr.dtype.element_ty), mask=m_out)
    b_lse = tl.where(m_empty, float("-inf"), (b_max + tl.log2(b_total)) * LN_2)
    tl.store(lse_ptr + i_h * Tq + o_m, b_lse, mask=o_m < Tq)


def block_dim(head_dim: int) -> int:
    """Head dims are padded to a power of two, tensor cores want at least 16."""
    return max(16, triton.next_power_of_2(head_dim))


def unit_rows(x: Tensor) -> Tensor:
    """The kernels want the last dimension contiguous; the others may have any stride."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def on_device(x: Tensor) -> torch.cuda.device:
    """Makes x's GPU the current one for a launch; does nothing for the interpreter's CPU tensors."""
    return torch.cuda.device(x.device if x.device.type == "cuda" else -1)


def _config(single: bool, widest: int) -> dict[str, int]:
    """Tiles and launch options without spills on sm_80, sm_90 and sm_100."""
    if single:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1}
    return {"BLOCK_M": 64 if widest <= 64 else 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}


def additive_fwd(q: Tensor, k: Tensor, v: Tensor, w: Tensor, bias: Tensor, mask: Visible) -> tuple[Tensor, Tensor]:
    """out [Tq, H, Dv] and lse [H, Tq]."""
    q, k, v = unit_rows(q), unit_rows(k), unit_rows(v)
    (Tq, H, D), (Tk, Hkv, DV) = q.shape, v.shape
    out = torch.empty((Tq, H, DV), dtype=q.dtype, device=q.device)
    lse = torch.empty((H, Tq), dtype=torch.float32, device=q.device)
    if Tq == 0:
        return out, lse
    config = _config(q.dtype == torch.float32, max(D, DV))
    pattern = (mask.span_q, mask.span_k, mask.allow_q, mask.bit_k)
    with on_device(q):
        _additive_fwd_kernel[(triton.cdiv(Tq, config["BLOCK_M"]), H)](
            q, k, v, w, bias, mask.lo, mask.hi, *pattern, out, lse,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], Tq, Tk, H, H // Hkv,
            D=D, DV=DV, PATTERN=mask.span_q is not None, BLOCK_DV=block_dim(DV), **config,
        )  # fmt: skip
    return out, lse


# What the ahead-of-time gate compiles: (kind, head dim, pattern).
AOT_LAUNCHES = (
    ("bf16", 64, False),
    ("bf16", 128, True),
    ("bf16", 256, False),
    ("fp32", 64, False),
    ("fp32", 128, True),
)
_INT32 = ("lo_ptr", "hi_ptr", "first_q_ptr", "last_q_ptr", "span_q_ptr", "span_k_ptr", "allow_q_ptr", "bit_k_ptr")
_TENSORS = ("q_ptr", "k_ptr", "v_ptr", "do_ptr", "out_ptr", "dk_ptr", "dv_ptr")


def aot_case(what: str, kernel: Any, launch: tuple[str, int, bool], config: dict[str, int]) -> TritonCase:
    """A TritonCase; types follow from the arguments' names."""
    from mmkernels.testing.aot import TritonCase

    kind, dim, pattern = launch
    constexprs: dict[str, Any] = {"D": dim, "DV": dim, "PATTERN": pattern}
    constexprs |= {"BLOCK_D": block_dim(dim), "BLOCK_DV": block_dim(dim)}
    constexprs |= {name: value for name, value in config.items() if name.startswith("BLOCK")}
    constexprs |= {"dlse_ptr": None} if kind == "fp32" else {}
    constexprs = {name: value for name, value in constexprs.items() if name in kernel.arg_names}

    def type_of(name: str) -> str:
        if name.endswith("_ptr"):
            return "*i32" if name in _INT32 else f"*{kind}" if name in _TENSORS else "*fp32"
        return "i32:16" if name.startswith("stride_") else "i32"

    signature = {name: type_of(name) for name in kernel.arg_names if name not in constexprs}
    options: dict[str, Any] = {name: value for name, value in config.items() if name.startswith("num_")}
    label = f"additive_{what}[{kind},D={dim}{',pattern' * pattern}]"
    return TritonCase(label, kernel, signature, constexprs, tensor_cores=True, **options)


def aot_cases() -> list[TritonCase]:
    """Every configuration that the launcher uses, with and without the mask's pattern."""
    return [
        aot_case("fwd", _additive_fwd_kernel, launch, _config(launch[0] == "fp32", launch[1]))
        for launch in AOT_LAUNCHES
    ]
