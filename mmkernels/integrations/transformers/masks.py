"""Masks of transformers' models: from functions of indices to what each query sees."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import masking_utils

from mmkernels.integrations.transformers.rows import Seen, encoded, seen_by, seen_in

__all__ = ["make_mask"]

_BLOCK = 1 << 22  # pairs whose visibility is computed at a time


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: Any = None,
    **options: Any,
) -> Tensor:
    """A mask in the form of rows.py, as `transformers.AttentionMaskInterface` asks for it. O(tokens) memory.

    Args:
        batch_size, q_length, kv_length: numbers of rows, queries and keys.
        q_offset, kv_offset: index of the first query and key.
        mask_function: (batch, head, query, key index) -> whether the key is seen; the same for all heads.
        attention_mask: [B, tokens] bool, False for padding, which no query sees.
        use_vmap: whether the function takes numbers, not tensors that broadcast.
        device: of the mask.
        **options: what the other implementations need; of these `config` tells whether the model's attention can be
            replaced.

    Raises:
        ValueError: the model computes attention by itself; or the pattern is neither an interval for each query nor of
            at most 31 classes of keys.
    """
    _expect_replaceable(options.get("config"))
    place = attention_mask.device if device is None and attention_mask is not None else device
    queries = torch.arange(q_length, device=place)
    valid = _valid(attention_mask, kv_length, kv_offset)
    if mask_function is masking_utils.bidirectional_mask_function:
        lo, hi = _rows(queries * 0, queries * 0 + kv_length, batch_size)
    elif mask_function is masking_utils.causal_mask_function:
        lo, hi = _rows(queries * 0, (queries + q_offset - kv_offset + 1).clamp(0, kv_length), batch_size)
    else:
        function = _by_index(mask_function) if use_vmap else mask_function

        def blocks(but_padding: Tensor | None) -> Iterator[Tensor]:
            keys = torch.arange(kv_length, device=place) + kv_offset
            for rows in (queries + q_offset).split(max(1, _BLOCK // max(batch_size * kv_length, 1))):
                block = _visible(function, batch_size, rows, keys, use_vmap)
                yield block if but_padding is None else block & but_padding[:, None]

        lo, hi, count = seen_by(blocks(None), kv_length)
        if torch.compiler.is_compiling():
            torch._assert_async((count == hi - lo).all(), "attention_mask: expected an interval of keys for each query")
        elif not bool((count == hi - lo).all()):
            return encoded(seen_in(lambda: blocks(valid), kv_length), valid is not None)
    return encoded(Seen(lo, hi) if valid is None else _without_padding(lo, hi, valid), valid is not None)


def _expect_replaceable(config: Any) -> None:
    """Models that compute attention by themselves accept any name of an implementation, and its masks."""
    source = sys.modules.get(type(config).__module__.replace(".configuration_", ".modeling_"))
    if source is None or hasattr(source, "ALL_ATTENTION_FUNCTIONS"):
        return
    if any(name.endswith("Attention") and isinstance(kind, type) for name, kind in vars(source).items()):
        raise ValueError(
            f"attn_implementation: expected 'eager' for {config.model_type}, which computes attention by itself, got "
            f"{config._attn_implementation!r}"
        )


def _by_index(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same mask without the mapping of indices to positions that transformers wraps around all parts of the mask of
    packed samples. Overlays of a model (image spans) look indices up: with positions they would find those of the
    row's first samples. Causal masks and windows are the same within a sample."""
    name = getattr(function, "__qualname__", "").split(".")[0]
    if name == masking_utils.remap_positions_for_packed_sequence.__name__:
        return inspect.getclosurevars(function).nonlocals["mask_function"]
    if name in ("and_masks", "or_masks"):
        parts = inspect.getclosurevars(function).nonlocals["mask_functions"]
        return getattr(masking_utils, name)(*map(_by_index, parts))
    return function


def _rows(lo: Tensor, hi: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    return lo.expand(batch, -1), hi.expand(batch, -1)


def _valid(attention_mask: Tensor | None, keys: int, first: int) -> Tensor | None:
    """bool [B, Tk]: what is no padding; keys that the mask does not reach are."""
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        raise ValueError(f"attention_mask: expected [B, tokens], got {list(attention_mask.shape)}")
    valid = attention_mask.bool()
    return F.pad(valid, (0, max(0, first + keys - valid.shape[1])))[:, first : first + keys]


def _visible(function: Callable[..., Any], batch: int, queries: Tensor, keys: Tensor, use_vmap: bool) -> Tensor:
    """bool [B, rows, Tk] of these queries."""
    batches, head = torch.arange(batch, device=keys.device), torch.arange(1, device=keys.device)
    if use_vmap:
        with masking_utils.TransformGetItemToIndex():
            return masking_utils._vmap_expansion_sdpa(function)(batches, head, queries, keys)[:, 0]
    seen = function(
        batches[:, None, None, None], head[None, :, None, None], queries[None, None, :, None], keys[None, None, None]
    )
    return seen.expand(batch, -1, len(queries), len(keys))[:, 0]


def _without_padding(lo: Tensor, hi: Tensor, valid: Tensor) -> Seen:
    """Intervals without the padding at their ends; with classes if there is some inside."""
    keys = valid.shape[1]
    index = torch.arange(keys + 1, device=valid.device)
    ends = F.pad(valid, (0, 1), value=True)  # index Tk ends every search
    following = torch.where(ends, index, keys).flip(1).cummin(1).values.flip(1)
    before = torch.where(F.pad(valid, (1, 0)), index, 0).cummax(1).values
    first, end = following.gather(1, lo), before.gather(1, hi)
    some = first < end
    first, end = torch.where(some, first, 0), torch.where(some, end, 0)
    number = F.pad(valid.cumsum(1), (1, 0))
    whole = number.gather(1, end) - number.gather(1, first) == end - first
    if not torch.compiler.is_compiling() and bool(whole.all()):
        return Seen(first, end)
    return Seen(first, end, torch.ones_like(first), (~valid).long())
