"""Calls into the native core: allocates outputs and launches the CPU kernels; there is no CUDA C++ kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.attention.types import Visible
from mmkernels.runtime import native
from mmkernels.runtime.native import View, threads, unit_stride, view

__all__ = ["additive_bwd", "additive_fwd"]


_View = View | None


def _visible(mask: Visible) -> tuple[_View, _View, _View, _View, _View, _View, _View, _View]:
    intervals = view(mask.lo), view(mask.hi), view(mask.first_q), view(mask.last_q)
    return *intervals, view(mask.span_q), view(mask.span_k), view(mask.allow_q), view(mask.bit_k)


def additive_fwd(q: Tensor, k: Tensor, v: Tensor, w: Tensor, bias: Tensor, mask: Visible) -> tuple[Tensor, Tensor]:
    """out [Tq, H, Dv] and lse [H, Tq]."""
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    out, lse = q.new_empty((q.shape[0], q.shape[1], v.shape[2])), w.new_empty((q.shape[1], q.shape[0]))
    inputs = view(q), view(k), view(v), view(w), view(bias)
    native.core.launch_attention_additive_fwd_cpu(*inputs, *_visible(mask), view(out), view(lse), threads())
    return out, lse


def additive_bwd(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    bias: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Visible,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq in w's dtype, dk, dv, dw."""
    grad_out, q, k, v, out = (unit_stride(x) for x in (grad_out, q, k, v, out))
    grad_lse = grad_lse.contiguous() if grad_lse is not None else None
    dq, dk, dv, dw = w.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), torch.empty_like(w)
    inputs = view(grad_out), view(grad_lse), view(q), view(k), view(v), view(w), view(bias), view(out), view(lse)
    outputs = view(dq), view(dk), view(dv), view(dw)
    native.core.launch_attention_additive_bwd_cpu(*inputs, *_visible(mask), *outputs, threads())
    return dq, dk, dv, dw
