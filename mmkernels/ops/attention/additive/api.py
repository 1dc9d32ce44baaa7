"""`additive_attention`: documentation, validation, routing."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.attention.additive.op import additive_fwd
from mmkernels.ops.attention.arguments import check_tensors, dtype_name, rows_of
from mmkernels.ops.attention.mask import AttentionMask
from mmkernels.ops.checks import dtype_names, expect_tensor, wrong_type, wrong_value
from mmkernels.ops.dtypes import compute_dtype
from mmkernels.runtime import backends

__all__ = ["additive_attention"]

# Register limits on a GPU, as in `attention`.
_MAX_TRITON_HEAD_DIM = 256
_MAX_TRITON_HEAD_DIM_FLOAT32 = 128


def additive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    mask: AttentionMask | None = None,
    *,
    bias: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of packed queries over their visible keys, with an additive score (Bahdanau).

        s_ij = <w, tanh(q_i + k_j + bias)>     out_i = sum_j softmax_j(s_ij) v_j     lse_i = log sum_j exp(s_ij)

    over the visible keys j of query i; q and k are already projected. Nothing of size Tq x Tk or Tq x Tk x D is stored.
    It costs a tanh per visible pair, head and element of D, where `attention` costs a tensor-core product; use it for
    models trained with it, or for short sequences. A query that sees no key gives out 0, lse -inf and zero gradients.
    Query head h reads key/value head h // (H / Hkv). Everything inside is float32 (float64 for float64). Dtypes are
    kept under torch.autocast.

    Args:
        q: [Tq, H, D] or [B, Tq, H, D]; float32, bfloat16, float16 or float64.
        k: [Tk, Hkv, D] or [B, Tk, Hkv, D], q's dtype; Hkv divides H.
        v: [Tk, Hkv, Dv] or [B, Tk, Hkv, Dv], q's dtype.
        w: [H, D], or [D] for all heads; float32 or q's dtype.
        mask: as for `attention`.
        bias: [H, D] or [D]; float32 or q's dtype; None: 0.
        return_lse: also return lse, which is differentiable.
        backend: None picks the fastest one that supports the call; or "native", "triton", "reference".

    Returns:
        out [Tq, H, Dv] (or [B, Tq, H, Dv]) in q's dtype; with `return_lse` also lse [H, Tq] (or [B, H, Tq]), natural
        logarithm, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: a wrong argument, by name, with what was expected and what came.
        BackendError: `backend` does not support this call.

    Source: Bahdanau et al. 2015.
    """
    check_tensors(q, k, v, mask, equal_heads=True)
    if not isinstance(return_lse, bool):
        wrong_type("return_lse", "a bool", return_lse)
    H, D = q.shape[-2:]
    compute = compute_dtype(q.dtype)
    w = _per_head("w", w, q, compute)
    bias = torch.zeros((H, D), dtype=compute, device=q.device) if bias is None else _per_head("bias", bias, q, compute)
    shape, samples, tokens_q = q.shape, q.shape[0] if q.ndim == 4 else 1, q.shape[-3]
    visible = rows_of(mask, samples, tokens_q, k.shape[-3], q.device, None).visible()
    if q.ndim == 4:
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    chosen = backends.resolve("attention", q, backend, _limits(q, v))
    out, lse = additive_fwd(q, k, v, w, bias, visible, chosen)
    if len(shape) == 4:
        out = out.view(*shape[:-1], v.shape[-1])
        lse = lse.view(H, samples, tokens_q).transpose(0, 1)
    return (out, lse) if return_lse else out


def _limits(q: Tensor, v: Tensor) -> dict[str, str | None] | None:
    limits: dict[str, str | None] = {}
    if q.device.type != "cpu":
        limits["native"] = "additive_attention has no CUDA C++ kernel"
    most = _MAX_TRITON_HEAD_DIM_FLOAT32 if q.dtype == torch.float32 else _MAX_TRITON_HEAD_DIM
    widest = max(q.shape[-1], v.shape[-1])
    if widest > most:
        limits["triton"] = f"head dims up to {most} in {dtype_name(q)}, not {widest}"
    return limits or None


def _per_head(name: str, x: Tensor, q: Tensor, compute: torch.dtype) -> Tensor:
    """[H, D] in the compute dtype, contiguous; gradients flow through the conversion."""
    H, D = q.shape[-2:]
    dtypes = (compute, q.dtype)
    expected = f"[{H}, {D}] or [{D}] " + dtype_names(*dtypes)
    expect_tensor(name, x, expected, ndim=(1, 2), dtypes=dtypes, like=q)
    if tuple(x.shape) not in ((H, D), (D,)):
        wrong_value(name, expected, x)
    return x.to(compute).expand(H, D).contiguous()
