"""Calls into the native core: allocates outputs and picks the CPU or CUDA launcher."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.attention.reference import bias_gradient, largest, sink_gradient, slope_gradient
from mmkernels.ops.attention.types import MaskRows, Options
from mmkernels.ops.dtypes import compute_dtype
from mmkernels.runtime import native
from mmkernels.runtime.native import View, stream, threads, unit_stride, view

__all__ = ["attention_bwd", "attention_fwd", "beyond_cuda"]


def beyond_cuda(options: Options) -> list[str]:
    """The given options, as arguments of `attention`, that the CUDA C++ kernels do not take."""
    given = {
        "alibi_slopes": options.slopes,
        "pair_bias": options.pair_bias,
        "sink": options.sink,
        "dropout_p": options.seed,
        "return_max_logit": options.with_max or None,
    }
    return [name for name, value in given.items() if value is not None]


def _expect_cuda_takes(options: Options) -> None:
    """For calls of the op itself; `attention` picks a backend that takes them."""
    if refused := beyond_cuda(options):
        raise ValueError(f"attention: the CUDA C++ kernels do not support {', '.join(refused)}")


def _tiles(x: Tensor) -> Tensor:
    """A layout TMA can read: unit stride along D, other strides in multiples of 16 bytes."""
    steps = x.stride()[:-1]
    good = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(s >= x.shape[-1] and s % 8 == 0 for s in steps)
    return x if good else x.clone(memory_format=torch.contiguous_format)


def _inputs(rows: MaskRows, *tensors: Tensor) -> list[Tensor]:
    """Inputs in a layout the kernels accept. On a GPU only the TMA kernels take a pattern; there is no fallback."""
    patterned = rows.tiles is not None and tensors[0].device.type != "cpu"
    return [_tiles(x) if patterned else unit_stride(x) for x in tensors]


_View = View | None


def _intervals(rows: MaskRows) -> tuple[_View, _View, _View, _View]:
    return view(rows.lo), view(rows.hi), view(rows.first_q), view(rows.last_q)


def _pattern(rows: MaskRows) -> tuple[_View, _View, _View, _View, _View]:
    return view(rows.span_q), view(rows.span_k), view(rows.allow_q), view(rows.bit_k), view(rows.tiles)


def _extras(
    rows: MaskRows, options: Options, row_sums: Tensor | None, distance_sums: Tensor | None
) -> tuple[_View, _View, _View, _View, _View, _View, _View, _View, _View]:
    """What only the CPU kernels take."""
    bias = view(rows.class_q), view(rows.class_k), view(options.pair_bias), view(row_sums)
    distances = view(rows.at_q), view(options.slopes), view(distance_sums)
    return *bias, view(options.sink), view(options.seed), *distances


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, rows: MaskRows, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """out [Tq, H, Dv], lse [H, Tq] and max_logit [H], empty if not wanted."""
    q, k, v = _inputs(rows, q, k, v)
    out = q.new_empty((q.shape[0], q.shape[1], v.shape[2]))
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=compute_dtype(q.dtype))
    inputs, outputs = (view(q), view(k), view(v), *_intervals(rows)), (view(out), view(lse))
    row_max = None
    softcap = options.softcap or 0.0
    if q.is_cuda:
        _expect_cuda_takes(options)
        native.core.launch_attention_fwd_cuda(*inputs, options.scale, *outputs, *_pattern(rows), softcap, stream(q))
    else:
        row_max = torch.empty_like(lse) if options.with_max else None
        extras = *_pattern(rows), *_extras(rows, options, None, None), view(row_max)
        native.core.launch_attention_fwd_cpu(
            *inputs, options.scale, *outputs, *extras, options.dropout_p, softcap, threads()
        )
    return out, lse, largest(row_max, lse)


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
    """dq, dk, dv, dbias, dsink and dslopes, contiguous; the last three empty without a bias, sink or slopes."""
    grad_out, q, k, v, out = _inputs(rows, grad_out, q, k, v, out)
    grad_lse = grad_lse.contiguous() if grad_lse is not None else None
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    delta, dbias, dsink, dslopes = torch.empty_like(lse), *(lse.new_empty(0) for _ in range(3))
    row_sums, distance_sums = None, None if options.slopes is None else torch.empty_like(lse)
    if options.pair_bias is not None:
        row_sums = lse.new_empty((q.shape[1], options.pair_bias.shape[2], q.shape[0]))  # [H, Ck, Tq]
    features = view(q), view(k), view(v), view(out), view(lse)
    inputs = view(grad_out), view(grad_lse), *features, *_intervals(rows)
    outputs = view(dq), view(dk), view(dv), view(delta)
    softcap = options.softcap or 0.0
    if q.is_cuda:
        _expect_cuda_takes(options)
        native.core.launch_attention_bwd_cuda(*inputs, options.scale, *outputs, *_pattern(rows), softcap, stream(q))
    else:
        extras = *_pattern(rows), *_extras(rows, options, row_sums, distance_sums)
        native.core.launch_attention_bwd_cpu(
            *inputs, options.scale, *outputs, *extras, options.dropout_p, softcap, threads()
        )
    if row_sums is not None:
        dbias = bias_gradient(row_sums, rows, options)
    if options.sink is not None:
        dsink = sink_gradient(delta, lse, options.sink)
    if distance_sums is not None:
        dslopes = slope_gradient(distance_sums)
    return dq, dk, dv, dbias, dsink, dslopes
