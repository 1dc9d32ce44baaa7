"""`attention`: documentation, validation, routing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.attention.additive import additive_attention
from mmkernels.ops.attention.arguments import (
    autocast,
    cap,
    check_logits,
    check_tensors,
    dtype_name,
    numbers,
    of_equal_heads,
    per_head,
    positions_of,
    rows_of,
)
from mmkernels.ops.attention.mask import AttentionMask
from mmkernels.ops.attention.native import beyond_cuda
from mmkernels.ops.attention.op import attention_fwd
from mmkernels.ops.attention.types import MaskRows, Options
from mmkernels.ops.checks import (
    deprecated,
    deprecated_deterministic,
    not_yet,
    wrong_type,
    wrong_value,
)
from mmkernels.runtime import backends

__all__ = ["attention"]

# Register limits on a GPU; in Triton a float32 product takes three tf32 products.
_MAX_GPU_HEAD_DIM = 256
_MAX_TRITON_HEAD_DIM_FLOAT32 = 128
_MAX_SM90_HEAD_DIM = 128


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    pair_bias: Tensor | None = None,
    sink: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    return_max_logit: bool = False,
    deterministic: bool | None = None,
    score: str | None = None,
    score_weight: Tensor | None = None,
    score_bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Softmax attention of packed queries over the keys that a mask lets them see.

        s_ij = cap(scale <q_i, k_j>) + pair_bias[class_i, class_j] - alibi_slopes |i - j|
        lse_i = log(exp(sink) + sum_j exp(s_ij))      out_i = sum_j exp(s_ij - lse_i) v_j

    over the visible keys j of query i (no sink: without its term), with cap(x) = softcap tanh(x / softcap). A query
    that sees no key gives out 0, lse -inf and zero gradients, with or without a sink. Query head h reads key/value head
    h // (H / Hkv). bf16 and fp16 accumulate in float32. The kernels read any strides as long as the last dimension is
    contiguous; otherwise a contiguous copy is made. Under torch.autocast, q, k and v are cast as for
    `F.scaled_dot_product_attention`.

    Args:
        q: [Tq, H, D] or [B, Tq, H, D]; float32, bfloat16, float16 or float64.
        k: [Tk, Hkv, D] or [B, Tk, Hkv, D], q's dtype; Hkv divides H (grouped and multi-query attention).
        v: [Tk, Hkv, Dv] or [B, Tk, Hkv, Dv], q's dtype; Dv may differ from D. k and v may also differ in the number of
            heads, if both numbers divide H and one divides the other: the smaller is repeated, in a copy.
        mask: which keys each query sees; with batched tensors it covers the B·Tq queries and B·Tk keys in order. None:
            every query sees all keys (batched: of its own sample).
        scale: factor of the logits; None: 1 / sqrt(D).
        softcap: bounds the scaled products smoothly to (-softcap, softcap), before all other terms (Gemma 2, Grok); a
            number from 1e-30 to 1e30, and at least scale / 1e38. None: no bound.
        alibi_slopes: [H] floating point, per query head; the logits lose it times the distance, in tokens, of query and
            key in their sample, aligned at their ends where a sample has more keys than queries or fewer (ALiBi, as in
            flash-attention); differentiable. The mask has the positions: `packed`, `batched`, `from_padding` (columns),
            `prefix`, `multimodal`, or what `with_positions` was given.
        pair_bias: [H, Cq, Ck] floating point, added to the logits by query head, class of the query and class of the
            key; differentiable. The mask has the classes: modalities of `multimodal` and `cross_only`, or what
            `from_rows` or `with_classes` were given.
        sink: [H] floating point, a logit per head that joins the softmax without a value; differentiable.
        dropout_p: in [0, 1): the probability of dropping an attention weight; the others are divided by 1 - dropout_p,
            and lse does not change. The seed comes from torch's generator of q's device and alone decides what is
            kept: the same on every backend, in the backward, and when the generator's state is replayed
            (`torch.utils.checkpoint`, `GradCache`). It applies whenever it is above 0: there is no training mode.
        return_lse: also return lse, which is differentiable.
        return_max_logit: also return the largest scaled product of each head over its visible pairs, before softcap and
            all other terms (for QK-clip); without a gradient. It is the last output. NaN for a head in which a visible
            product is NaN; what the mask hides never counts.
        deterministic: deprecated, without effect: no backend uses atomics, so the same input and thread count always
            give the same bits.
        score, score_weight, score_bias: deprecated: for score="additive" call `additive_attention` with w
            `score_weight` and bias `score_bias`; "dot" is the default.
        backend: None picks the fastest one that supports the call; or "native", "triton", "reference".

    Returns:
        out [Tq, H, Dv] (or [B, Tq, H, Dv]) in q's dtype; with `return_lse` also lse [H, Tq] (or [B, H, Tq]), natural
        logarithm, float32 (float64 for float64). Both are differentiable twice, and in forward mode.
        With `return_max_logit` also max_logit [H] in the dtype of lse, -inf for a head that sees nothing.

    Raises:
        TypeError, ValueError: a wrong argument, by name, with what was expected and what came.
        BackendError: `backend` does not support this call.

    Source: Vaswani et al. 2017 (attention); Dao 2023 (FlashAttention-2: tiling, recomputation); Xiao et al. 2023
        (sinks); Gemma Team 2024 (Gemma 2: soft caps); Press et al. 2022 (ALiBi); Salmon et al. 2011 (Philox).
    """
    deprecated_deterministic(deterministic)
    if _is_additive(score, score_weight, score_bias):
        logits = dict(scale=scale, softcap=softcap, alibi_slopes=alibi_slopes, pair_bias=pair_bias, sink=sink)
        _expect_defaults(**logits, dropout_p=dropout_p or None, return_max_logit=return_max_logit or None)
        assert score_weight is not None
        return additive_attention(q, k, v, score_weight, mask, bias=score_bias, return_lse=return_lse, backend=backend)
    q, k, v = autocast(q, k, v)
    check_tensors(q, k, v, mask)
    factor, dropout_p = numbers(q, scale, dropout_p)
    for name, flag in (("return_lse", return_lse), ("return_max_logit", return_max_logit)):
        if not isinstance(flag, bool):
            wrong_type(name, "a bool", flag)
    pair_bias, sink = check_logits(q, pair_bias, sink, mask)
    slopes = per_head("alibi_slopes", alibi_slopes, q)
    k, v = of_equal_heads(k, v)
    shape, tokens_q, tokens_k = q.shape, q.shape[-3], k.shape[-3]
    samples = shape[0] if q.ndim == 4 else 1
    if q.ndim == 4:
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    rows = rows_of(mask, samples, tokens_q, tokens_k, q.device, pair_bias)
    if slopes is not None:
        rows = rows.changed(at_q=positions_of(mask, samples, tokens_q, tokens_k, q.device))
    seed = _seed(q.device) if dropout_p > 0 else None
    options = Options(pair_bias, sink, seed, dropout_p, factor, cap(softcap, factor), slopes, return_max_logit)
    chosen = backends.resolve("attention", q, backend, _limits(q, v, rows, options))
    out, lse, max_logit = attention_fwd(q, k, v, rows, options, chosen)
    if len(shape) == 4:
        out = out.view(*shape[:-1], v.shape[-1])
        lse = lse.view(shape[2], samples, tokens_q).transpose(0, 1)
    wanted = (out, *((lse,) if return_lse else ()), *((max_logit,) if return_max_logit else ()))
    return wanted if len(wanted) > 1 else out


def _is_additive(score: Any, weight: Tensor | None, bias: Tensor | None) -> bool:
    if score not in (None, "dot", "additive"):
        wrong_value("score", "None, 'dot' or 'additive'", score)
    if score == "additive" and weight is None:
        raise ValueError("score_weight: expected [H, D] or [D] floating point with score='additive', got None")
    for name, value in (("score_weight", weight), ("score_bias", bias)):
        if score != "additive" and value is not None:
            wrong_value(name, "None without score='additive'", value)
    if score is not None:
        instead = "call additive_attention(q, k, v, score_weight, mask, bias=score_bias)"
        deprecated("score", instead if score == "additive" else "leave it out")
    return score == "additive"


def _expect_defaults(**options: Any) -> None:
    """Reject options that an additive score does not support, rather than silently ignore them."""
    for name, value in options.items():
        if value is not None:
            not_yet(f"{name} with score='additive'", value)


def _seed(device: torch.device) -> Tensor:
    """A seed from the device's torch generator, without a sync: int64 [1]."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def _limits(q: Tensor, v: Tensor, rows: MaskRows, options: Options) -> dict[str, str | None] | None:
    """Why each backend cannot take this call."""
    head_dim = max(q.shape[-1], v.shape[-1])
    triton = _MAX_TRITON_HEAD_DIM_FLOAT32 if q.dtype == torch.float32 else _MAX_GPU_HEAD_DIM
    limits: dict[str, str | None] = {}
    if head_dim > triton:
        limits["triton"] = f"head dims up to {triton} in {dtype_name(q)}, not {head_dim}"
    if q.device.type != "cpu":
        if head_dim > _MAX_GPU_HEAD_DIM:
            limits["native"] = f"head dims up to {_MAX_GPU_HEAD_DIM} on a GPU, not {head_dim}"
        refused = beyond_cuda(options)
        lacking = _pattern_wants(q, v) if rows.span_q is not None else None
        if lacking is not None:
            refused.insert(0, f"spans and classes in a mask (which require {lacking})")
        if refused:
            limits["native"] = f"the CUDA C++ kernels do not support {', '.join(refused)}"
    return limits or None


def _pattern_wants(q: Tensor, v: Tensor) -> str | None:
    """The unmet requirement of the CUDA C++ kernels that take a pattern; None if they can run the call."""
    dims = q.shape[-1], v.shape[-1]
    if max(dims) > _MAX_SM90_HEAD_DIM or any(dim % 8 for dim in dims):
        return f"head dims that are multiples of 8 up to {_MAX_SM90_HEAD_DIM}, not {dims[0]} and {dims[1]}"
    return backends.sm90_wants(q.device, q.dtype)
