"""The reference loop's model in plain PyTorch: its modules with their ops replaced by what one writes without this
package, either over the same packed tokens with a dense mask, or with every sample padded to the longest.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels
from mmkernels import AttentionMask
from mmkernels.ops.attention import norm_rope
from mmkernels.testing.attention_rows import plain_gated_residual, plain_norm_rope
from mmkernels.testing.contrastive import plain_infonce, plain_infonce_options, plain_siglip

__all__ = ["Padded", "plain_ops"]


@dataclass(frozen=True)
class Padded:
    """The mask of samples that are padded to the longest.

    Args:
        samples, longest: S and L: tokens are [S L, ...].
        seen: bool [S, 1, 1 or L, L], which keys a query sees; None for all, if samples have one length.
        causal: whether a token sees no later one, besides.
    """

    samples: int
    longest: int
    seen: Tensor | None
    causal: bool


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """[..., T, H, D] -> [..., T, H, D]"""
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(-3, -2)


class _Attention:
    """Attention as SDPA computes it; a dense mask is built once for each `AttentionMask`, as trainers do per batch."""

    def __init__(self) -> None:
        self._dense: dict[int, tuple[Any, Tensor]] = {}  # with the mask, so that no other gets its id

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask | Padded | None = None,
        *,
        scale: float | None = None,
        dropout_p: float = 0.0,
        backend: str | None = None,
    ) -> Tensor:
        options: dict[str, Any] = {"scale": scale, "dropout_p": dropout_p}
        if isinstance(mask, Padded):
            shape = (mask.samples, mask.longest)
            causal = mask.causal and mask.seen is None
            seen = mask.seen
            if seen is not None and mask.causal:
                seen = seen & torch.ones(shape[1], shape[1], dtype=torch.bool, device=q.device).tril()
            out = _sdpa(*(x.unflatten(0, shape) for x in (q, k, v)), attn_mask=seen, is_causal=causal, **options)
            return out.flatten(0, 1)
        if mask is None:
            return _sdpa(q[None], k[None], v[None], **options)[0]
        _, dense = self._dense.setdefault(id(mask), (mask, mask.to_dense(len(q), len(k))))
        blind = ~dense.any(1)
        out = _sdpa(q[None], k[None], v[None], attn_mask=dense | blind[:, None], **options)[0]
        return out.masked_fill(blind[:, None, None], 0)

    def forget(self) -> None:
        """Before the next batch."""
        self._dense.clear()


def _norm_rope(
    x: Tensor,
    position_ids: Tensor | None = None,
    *,
    cos_sin: Any = None,
    interleaved: bool = False,
    norm: str | None = "rms",
    eps: float = 1e-6,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    assert position_ids is None
    return plain_norm_rope(x, weight, bias, cos_sin=cos_sin, norm=norm, eps=eps, interleaved=interleaved)


# Arguments of infonce that change how, not what it computes, and defaults of the others.
_HOW = ("group", "exchange", "machine", "gathered", "return_stats", "backend")
_DEFAULTS = {"same_id": "positive", "label_smoothing": 0.0, "symmetric": True, "decoupled": False, "hardness": 0.0}


def _infonce(queries: Tensor, keys: Tensor, logit_scale: Tensor, **options: Any) -> Tensor:
    assert options.get("group") is None and not options.get("return_stats")
    what = {name: value for name, value in options.items() if name not in _HOW and value is not None}
    given = {name: value for name, value in what.items() if isinstance(value, Tensor) or value != _DEFAULTS.get(name)}
    return (
        plain_infonce_options(queries, keys, logit_scale, **given)
        if given
        else plain_infonce(queries, keys, logit_scale)
    )


def _siglip(queries: Tensor, keys: Tensor, logit_scale: Tensor, logit_bias: Tensor, **options: Any) -> Tensor:
    assert options.get("query_ids") is None and options.get("group") is None
    return plain_siglip(queries, keys, logit_scale, logit_bias)


def _segment_pool(x: Tensor, cu_seqlens: Tensor, mode: str, *, weights: Tensor | None = None, **_: Any) -> Tensor:
    lengths = cu_seqlens.diff()
    segment = torch.repeat_interleave(torch.arange(len(lengths), device=x.device), lengths)
    x = x[: len(segment)]
    if mode == "max":
        index = segment[:, None].expand_as(x)
        return x.new_zeros(len(lengths), x.shape[1]).scatter_reduce(0, index, x, "amax", include_self=False)
    if mode == "weighted":
        assert weights is not None
        x = x * weights[: len(segment), None]
    total = x.new_zeros(len(lengths), x.shape[1]).index_add(0, segment, x)
    return total / lengths.clamp(min=1)[:, None] if mode == "mean" else total


def _pack(x: Any, index: Tensor, *, backend: str | None = None) -> Tensor:
    rows = x if isinstance(x, Tensor) else torch.cat(list(x))
    return rows.index_select(0, index.clamp(min=0).long()).masked_fill((index < 0)[:, None], 0)


def _gated_residual(residual: Tensor, x: Tensor, gate: Tensor, *, backend: str | None = None) -> Tensor:
    return plain_gated_residual(residual, x, gate)


def _padded(mask: AttentionMask, tokens: int) -> tuple[Padded, Tensor]:
    """The mask of the padded samples, and each token's place among theirs: int64 [T]."""
    rows = mask.rows(tokens, tokens)
    _, lengths = torch.unique_consecutive(rows.lo, return_counts=True)
    ends = (rows.lo.unique_consecutive() + lengths).repeat_interleave(lengths)
    positions = torch.arange(tokens, device=ends.device)
    longest = int(lengths.max())
    valid = torch.arange(longest, device=ends.device) < lengths[:, None]  # [S, L]
    slot = torch.nonzero(valid.flatten()).flatten()
    whole, causal = bool((rows.hi == ends).all()), bool((rows.hi == positions + 1).all())
    if rows.span_q is None and rows.allow_q is None and (whole or causal):
        return Padded(len(lengths), longest, None if bool(valid.all()) else valid[:, None, None], causal), slot
    token = torch.zeros(len(lengths) * longest, dtype=torch.int64, device=ends.device).index_copy(0, slot, positions)
    token = token.view(len(lengths), longest)
    seen = mask.to_dense(tokens, tokens)[token[:, :, None], token[:, None, :]] & valid[:, None, :]
    seen = seen | ~seen.any(2, keepdim=True)  # padding sees something, or SDPA gives NaN
    return Padded(len(lengths), longest, seen[:, None], False), slot


def _padded_blocks(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`Blocks.forward` over samples padded to the longest: norms, projections and feed-forwards see the padding too."""

    def forward(self: Any, x: Tensor, mask: Any, positions: Tensor | None = None, depth: int | None = None) -> Tensor:
        whole, slot = _padded(mask, len(x))
        room = whole.samples * whole.longest

        def padded(rows: Tensor) -> Tensor:
            return rows.new_zeros(room, *rows.shape[1:]).index_copy(0, slot, rows)

        found = original(self, padded(x), whole, None if positions is None else padded(positions), depth)
        return found.index_select(0, slot)

    return forward


@contextmanager
def _replaced(ops: Mapping[Any, Any]) -> Iterator[None]:
    """Every module of the loop that names one of these functions names its replacement."""
    places = [
        (module, name, value)
        for of, module in list(sys.modules.items())
        if of.startswith(("mmkernels.nn", "mmkernels.pretrain"))
        for name, value in vars(module).items()
        if callable(value) and getattr(value, "__hash__", None) and value in ops
    ]
    try:
        for module, name, value in places:
            setattr(module, name, ops[value])
        yield
    finally:
        for module, name, value in places:
            setattr(module, name, value)


@contextmanager
def plain_ops(blocks: Any = None) -> Iterator[None]:
    """Within it the loop's modules compute in plain PyTorch, with dense masks over packed tokens.

    Args:
        blocks: the class of the loop's stacks of blocks, to compute them over padded samples instead.
    """
    attention = _Attention()
    ops = {
        mmkernels.attention: attention,
        mmkernels.infonce: _infonce,
        mmkernels.siglip: _siglip,
        mmkernels.segment_pool: _segment_pool,
        mmkernels.pack: _pack,
        mmkernels.gated_residual: _gated_residual,
        norm_rope: _norm_rope,
    }
    original = None if blocks is None else blocks.forward
    if blocks is not None:
        blocks.forward = _padded_blocks(blocks.forward)
    try:
        with _replaced(ops):
            yield
    finally:
        if blocks is not None:
            blocks.forward = original
        attention.forget()
