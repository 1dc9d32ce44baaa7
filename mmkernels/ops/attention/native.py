"""Calls of the native core: allocates the outputs and picks the CPU or the CUDA launcher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.attention.reference import bias_gradient, sink_gradient
from mmkernels.ops.attention.types import MaskRows, Options
from mmkernels.runtime import native

__all__ = ["attention_bwd", "attention_fwd"]


def _rows(x: Tensor) -> Tensor:
    """The kernels want the last dimension contiguous; the others may have any stride."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _tiles(x: Tensor) -> Tensor:
    """What TMA can follow: rows side by side or apart, at multiples of 16 bytes."""
    steps = x.stride()[:-1]
    good = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(s >= x.shape[-1] and s % 8 == 0 for s in steps)
    return x if good else x.clone(memory_format=torch.contiguous_format)


def _inputs(rows: MaskRows, *tensors: Tensor) -> list[Tensor]:
    """As the kernels want them. On a GPU those that take a pattern fetch with TMA, and no other can stand in."""
    patterned = rows.tiles is not None and tensors[0].device.type != "cpu"
    return [_tiles(x) if patterned else _rows(x) for x in tensors]


def _views(*values: Tensor | float | None) -> list[Any]:
    return [native.view(x) if x is None or isinstance(x, Tensor) else x for x in values]


def _launch(what: str, q: Tensor, inputs: list[Any], outputs: list[Any], extras: list[Any]) -> None:
    """Of the extras the CUDA launchers take the pattern: api.py lets nothing else through to them."""
    if q.device.type == "cpu":
        launch = getattr(native.core(), f"launch_attention_{what}_cpu")
        launch(*_views(*inputs, *outputs, *extras), native.threads())
        return
    with torch.cuda.device(q.device):
        launch = getattr(native.core(), f"launch_attention_{what}_cuda")
        launch(*_views(*inputs, *outputs, *extras[:5]), native.stream(q))


def _extras(rows: MaskRows, options: Options, row_sums: Tensor | None) -> list[Any]:
    pattern = [rows.span_q, rows.span_k, rows.allow_q, rows.bit_k, rows.tiles]
    bias = [rows.class_q, rows.class_k, options.pair_bias, row_sums]
    return [*pattern, *bias, options.sink, options.seed, options.dropout_p]


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, rows: MaskRows, options: Options) -> tuple[Tensor, Tensor]:
    """out [Tq, H, Dv] and lse [H, Tq]."""
    q, k, v = _inputs(rows, q, k, v)
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty((q.shape[0], q.shape[1], v.shape[2]), dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=lse_dtype, device=q.device)
    _launch("fwd", q, [q, k, v, *rows[:4], options.scale], [out, lse], _extras(rows, options, None))
    return out, lse


def attention_bwd(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rows: MaskRows,
    options: Options,
) -> tuple[Tensor, ...]:
    """dq, dk, dv, dbias and dsink, contiguous; the last two empty where there is none."""
    grad_out, q, k, v, out = _inputs(rows, grad_out, q, k, v, out)
    grad_lse = grad_lse.contiguous() if grad_lse is not None else None
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta, dbias, dsink = torch.empty_like(lse), lse.new_empty(0), lse.new_empty(0)
    row_sums = None
    if options.pair_bias is not None:
        row_sums = lse.new_empty((q.shape[1], options.pair_bias.shape[2], q.shape[0]))  # [H, Ck, Tq]
    inputs = [grad_out, grad_lse, q, k, v, out, lse, *rows[:4], options.scale]
    _launch("bwd", q, inputs, [dq, dk, dv, delta], _extras(rows, options, row_sums))
    if row_sums is not None:
        dbias = bias_gradient(row_sums, rows, options)
    if options.sink is not None:
        dsink = sink_gradient(delta, lse, options.sink)
    return dq, dk, dv, dbias, dsink
