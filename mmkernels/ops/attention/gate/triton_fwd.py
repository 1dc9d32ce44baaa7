"""Forward of the gated residual in Triton: out = residual + tanh(gate) x.

A program owns a tile of BLOCK_N rows and BLOCK_C columns and loads its gates once, per column or per row. All
arithmetic is float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.triton_common import cast, tanh, unit_rows

__all__ = ["gated_residual_fwd"]

# Elements of a tile: 16 per thread with four warps.
_TILE = 2048
_MOST_COLUMNS = 512


@triton.jit
def load_gate(gate_ptr, o_n, m_n, o_c, m_c, gates, BY_COLUMN: tl.constexpr):
    """tanh of the tile's gates: [1, BLOCK_C] or [BLOCK_N, 1]."""
    if BY_COLUMN:
        b_gate = tl.load(gate_ptr + o_c, mask=m_c, other=0.0)[None, :]
    else:
        b_gate = tl.load(gate_ptr + o_n % gates, mask=m_n, other=0.0)[:, None]
    return tanh(b_gate)


@triton.jit
def load_tile(x_ptr, stride_n, o_n, m_n, o_c, m_c):
    """float32, zeros outside: [BLOCK_N, BLOCK_C]."""
    p_x = x_ptr + o_n[:, None] * stride_n + o_c[None, :]
    return tl.load(p_x, mask=m_n[:, None] & m_c[None, :], other=0.0).to(tl.float32)


@triton.jit
def _gated_residual_fwd_kernel(
    residual_ptr,  # [N, C]
    x_ptr,  # [N, C]
    gate_ptr,  # [C], or [gates]: row n reads n % gates
    out_ptr,  # [N, C]
    stride_rn, stride_xn, N, C, gates,
    BY_COLUMN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_n, m_c = o_n < N, o_c < C
    b_gate = load_gate(gate_ptr, o_n, m_n, o_c, m_c, gates, BY_COLUMN)
    b_out = load_tile(residual_ptr, stride_rn, o_n, m_n, o_c, m_c)  # [BLOCK_N, BLOCK_C]
    b_out += b_gate * load_tile(x_ptr, stride_xn, o_n, m_n, o_c, m_c)
    p_out = out_ptr + o_n[:, None] * C + o_c[None, :]
    tl.store(p_out, cast(b_out, out_ptr.dtype.element_ty), mask=m_n[:, None] & m_c[None, :])


def tile(width: int) -> dict[str, int]:
    """Rows and columns of a tile for rows of `width` elements."""
    columns = min(triton.next_power_of_2(width), _MOST_COLUMNS)
    return {"BLOCK_N": max(_TILE // columns, 1), "BLOCK_C": columns}


def gated_residual_fwd(residual: Tensor, x: Tensor, gate: Tensor, by_column: bool) -> Tensor:
    """out [N, C]."""
    residual, x = unit_rows(residual), unit_rows(x)
    out = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    if out.numel() == 0:
        return out
    (N, C), block = x.shape, tile(x.shape[1])
    grid = (triton.cdiv(N, block["BLOCK_N"]), triton.cdiv(C, block["BLOCK_C"]))
    _gated_residual_fwd_kernel[grid](
        residual, x, gate.contiguous(), out, residual.stride(0), x.stride(0), N, C, gate.shape[0],
        BY_COLUMN=by_column, **block,
    )  # fmt: skip
    return out
