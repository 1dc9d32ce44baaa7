"""Backward of the gated residual in Triton: dx = tanh(gate) g, dgate = (1 - tanh(gate)^2) sum g x.

A program owns TILES consecutive row tiles in one block of columns. For per-column gates it accumulates over its rows in
float32 registers and writes one line of partial sums. For per-row gates it writes each row's sum over its columns.
Partial sums are added in order afterwards: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.attention.gate.triton_fwd import load_gate, load_tile, tile
from mmkernels.ops.triton_common import cast, unit_rows

__all__ = ["gated_residual_bwd"]

_TILES = 32


@triton.jit
def _gated_residual_bwd_kernel(
    grad_out_ptr,  # [N, C]
    x_ptr,  # [N, C]
    gate_ptr,  # [C], or [gates]
    dx_ptr,  # [N, C]
    sums_ptr,  # [programs of rows, C], or [blocks of columns, N]
    stride_gn, stride_xn, N, C, gates, tiles,
    BY_COLUMN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i_p, i_c = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_sums = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for i in range(tiles):
        o_n = (i_p * tiles + i) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        b_gate = load_gate(gate_ptr, o_n, m_n, o_c, m_c, gates, BY_COLUMN)
        b_g = load_tile(grad_out_ptr, stride_gn, o_n, m_n, o_c, m_c)  # [BLOCK_N, BLOCK_C]
        b_x = load_tile(x_ptr, stride_xn, o_n, m_n, o_c, m_c)
        p_dx = dx_ptr + o_n[:, None] * C + o_c[None, :]
        tl.store(p_dx, cast(b_gate * b_g, dx_ptr.dtype.element_ty), mask=m_n[:, None] & m_c[None, :])
        if BY_COLUMN:
            b_sums += b_g * b_x
        else:
            tl.store(sums_ptr + i_c * N + o_n, tl.sum(b_g * b_x, 1), mask=m_n)
    if BY_COLUMN:
        tl.store(sums_ptr + i_p * C + o_c, tl.sum(b_sums, 0), mask=m_c)


def gated_residual_bwd(grad_out: Tensor, x: Tensor, gate: Tensor, by_column: bool) -> tuple[Tensor, Tensor]:
    """dx [N, C] and dgate [G]."""
    grad_out, x, gate = unit_rows(grad_out), unit_rows(x), gate.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if dx.numel() == 0:
        return dx, torch.zeros_like(gate)
    (N, C), block = x.shape, tile(x.shape[1])
    tiles = _TILES if by_column else 1
    grid = (triton.cdiv(N, block["BLOCK_N"] * tiles), triton.cdiv(C, block["BLOCK_C"]))
    sums = torch.empty((grid[0], C) if by_column else (grid[1], N), dtype=torch.float32, device=x.device)
    _gated_residual_bwd_kernel[grid](
        grad_out, x, gate, dx, sums, grad_out.stride(0), x.stride(0), N, C, gate.shape[0], tiles,
        BY_COLUMN=by_column, **block,
    )  # fmt: skip
    t = gate.tanh()
    total = sums.sum(0) if by_column else sums.view(-1, gate.shape[0]).sum(0)
    return dx, total * (1 - t) * (1 + t)
