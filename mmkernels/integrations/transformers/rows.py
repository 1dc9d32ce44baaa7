"""Masks of transformers as one small tensor: what each query sees, in O(tokens).

The models of transformers hand a mask from where it is made to every layer, and expect a tensor of four dimensions.
Ours holds, for each query of each row of the batch, the interval of keys that it sees:

    int32 [B, 1, 1 + Tq, C]        after an empty line a line for each query: lo, hi, allow, and, where C = 4, a
                                   constant that says that the caller gave a padding mask
    int32 [B, 1, 1 + Tq + Tk, C]   with holes in the intervals: then column 0 of the further lines is the class of each
                                   key, and a query sees the keys whose bit is set in its `allow`

The empty line makes a model fail that adds the mask to its logits, since the shapes never fit, and one that passes only
a part of the mask on, since the number of lines is wrong. Being data, the mask survives torch.compile, checkpointing
and a move to another device. What is computed from it, an `AttentionMask`, is kept as an attribute of the tensor, so
that all layers share it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkernels import AttentionMask

__all__ = ["Seen", "Segments", "decoded", "encoded", "from_dense", "is_encoded", "kept"]

_COLUMNS, _PADDED_COLUMNS = 3, 4
MOST_CLASSES = 31  # bits of an int32 without its sign
_KEPT = 7  # results besides the newest, such as those of full and sliding layers


class Seen(NamedTuple):
    """Keys that queries see: [lo, hi) of each query [B, Tq], and of these those whose class [B, Tk] is allowed."""

    lo: Tensor
    hi: Tensor
    allow: Tensor | None = None
    classes: Tensor | None = None


class Segments(NamedTuple):
    """The part of its row that each query may see at most: [start, end), [B, Tq]."""

    start: Tensor
    end: Tensor

    @classmethod
    def of_positions(cls, position_ids: Tensor) -> Segments:
        """A sample begins wherever positions begin again, at 0."""
        tokens = position_ids.shape[1]
        index = torch.arange(tokens, device=position_ids.device)
        begins = (position_ids == 0) | (index == 0)
        start = torch.where(begins, index, 0).cummax(1).values
        following = torch.where(begins, index, tokens).flip(1).cummin(1).values.flip(1)  # at or after each token
        end = torch.cat([following[:, 1:], following.new_full((len(following), 1), tokens)], 1)
        return cls(start, end)

    @classmethod
    def of_boundaries(cls, cu_q: Tensor, cu_k: Tensor, tokens: int) -> Segments:
        """Segment s of the queries sees segment s of the keys; one row."""
        cu_q, cu_k = cu_q.long(), cu_k.long()
        segment = torch.searchsorted(cu_q, torch.arange(tokens, device=cu_q.device), right=True) - 1
        return cls(cu_k[segment][None], cu_k[(segment + 1).clamp(max=len(cu_k) - 1)][None])


def encoded(seen: Seen, padded: bool) -> Tensor:
    """The tensor above."""
    allow = torch.full_like(seen.lo, -1) if seen.allow is None else seen.allow
    columns = [seen.lo, seen.hi, allow, *([torch.ones_like(seen.lo)] if padded else [])]
    lines = torch.stack([column.int() for column in columns], -1)
    if seen.classes is not None:
        of_keys = seen.classes.int()[..., None].expand(-1, -1, lines.shape[-1])
        lines = torch.cat([lines, of_keys], 1)
    return torch.nn.functional.pad(lines, (0, 0, 1, 0))[:, None]


def is_encoded(mask: Any) -> bool:
    """Whether it is one of ours, not a mask of somebody's own."""
    return (
        isinstance(mask, Tensor)
        and mask.ndim == 4
        and mask.dtype == torch.int32
        and mask.shape[1] == 1
        and mask.shape[-1] in (_COLUMNS, _PADDED_COLUMNS)
    )


def is_padded(mask: Tensor) -> bool:
    """Whether the caller gave a padding mask."""
    return mask.shape[-1] == _PADDED_COLUMNS


def decoded(mask: Tensor, batch: int, tokens_q: int, tokens_k: int, segments: Segments | None = None) -> AttentionMask:
    """The mask of the B·Tq queries and B·Tk keys of a batch, narrowed to segments.

    Raises:
        ValueError: a mask of other numbers of tokens.
    """
    if mask.shape[2] not in (1 + tokens_q, 1 + tokens_q + tokens_k):
        raise ValueError(
            f"attention_mask: expected the mask of {tokens_q} queries and {tokens_k} keys, got {list(mask.shape)} of "
            "others: was it made for other tokens, or only a part of it passed on?"
        )
    rows = mask[:, 0, 1:].expand(batch, -1, -1)
    lo, hi = rows[:, :tokens_q, 0].long(), rows[:, :tokens_q, 1].long()
    if segments is not None:
        lo, hi = torch.maximum(lo, segments.start), torch.minimum(hi, segments.end)
        hi = torch.maximum(lo, hi)
        lo, hi = torch.where(lo < hi, lo, 0), torch.where(lo < hi, hi, 0)
    first = torch.arange(batch, device=rows.device)[:, None] * tokens_k
    interval = (lo + first).flatten(), (hi + first).flatten()
    if rows.shape[1] == tokens_q:
        return AttentionMask.from_rows(*interval)
    allow, classes = rows[:, :tokens_q, 2].reshape(-1), rows[:, tokens_q:, 0].reshape(-1)
    return AttentionMask.from_rows(*interval, allow_q=allow, class_k=classes)


def kept(holder: Tensor, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """What `make` returns, made once for this tensor and key (tensors in it count by identity) as long as none of them
    is changed in place; anew while torch.compile traces, and for tensors of inference mode, which count no changes."""
    tensors = [holder, *(part for part in key if isinstance(part, Tensor))]
    if torch.compiler.is_compiling() or any(map(torch.is_inference, tensors)):
        return make()
    stamp = [(id(part), part._version) if isinstance(part, Tensor) else part for part in (holder, *key)]
    made = holder.__dict__.setdefault("_mmkernels", [])
    for known, _, value in made:
        if known == stamp:
            return value
    value = make()
    del made[:-_KEPT]
    made.append((stamp, tensors[1:], value))  # holds the tensors, so that no other gets their id
    return value


# Masks that are given dense, and functions of indices


def seen_by(blocks: Iterator[Tensor], keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """First key seen, end of the last, and their number, [B, Tq] each, from blocks of rows bool [B, rows, Tk]."""
    firsts, ends, counts = [], [], []
    for block in blocks:
        count = block.sum(-1)
        as_bytes = block.to(torch.uint8)
        some = count > 0
        firsts.append(torch.where(some, as_bytes.argmax(-1), 0) if keys else count)
        ends.append(torch.where(some, keys - as_bytes.flip(-1).argmax(-1), 0) if keys else count)
        counts.append(count)
    return torch.cat(firsts, 1), torch.cat(ends, 1), torch.cat(counts, 1)


def classified(blocks: Callable[[], Iterator[Tensor]], keys: int) -> Seen | None:
    """Keys that the same queries see are of one class; None if a row of the batch has more classes than bits.

    Args:
        blocks: yields rows of what is seen, bool [B, rows, Tk], the same in every call.
        keys: Tk.
    """
    generator = torch.Generator().manual_seed(0)
    marks: Tensor | int = 0
    for block in blocks():  # keys seen by the same queries have the same sum of random numbers
        numbers = torch.randint(-(2**62), 2**62, (block.shape[1],), generator=generator).to(block.device)
        marks = marks + (block * numbers[:, None]).sum(1)
    if not isinstance(marks, Tensor):
        return None
    classes, examples = [], []
    for row in marks:
        values, kind = row.unique(return_inverse=True)
        if len(values) > MOST_CLASSES:
            return None
        classes.append(kind)
        first = torch.full((MOST_CLASSES,), keys, device=row.device)
        examples.append(first.scatter_reduce(0, kind, torch.arange(keys, device=row.device), "amin"))
    kinds, example = torch.stack(classes), torch.stack(examples)
    bits = 1 << torch.arange(MOST_CLASSES, device=kinds.device)
    allow = []
    for block in blocks():
        padded = torch.cat([block, block.new_zeros(*block.shape[:2], 1)], -1)
        of_class = padded.gather(2, example[:, None].expand(-1, block.shape[1], -1))
        allow.append((of_class * bits).sum(-1))
        if not torch.equal(of_class.gather(2, kinds[:, None].expand(block.shape)), block):
            return None
    allowed = torch.cat(allow, 1)
    return Seen(torch.zeros_like(allowed), torch.full_like(allowed, keys), allowed, kinds)


def from_dense(mask: Tensor, tokens_q: int, tokens_k: int) -> Seen:
    """What a mask of somebody's own lets queries see.

    Args:
        mask: [B, 1, Tq, Tk], or 1 for B or Tq: bool, True where a key is seen; or floating point, 0 there, elsewhere
            at most -10,000, where nothing is left of an exponential.

    Raises:
        TypeError: integers.
        ValueError: another shape, a mask with a gradient, one mask per head, numbers that are added to logits, or a
            pattern that is neither an interval for each query nor of at most 31 classes of keys.
    """
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2] not in (1, tokens_q) or mask.shape[3] < tokens_k:
        raise ValueError(
            f"attention_mask: expected a mask [B, 1, {tokens_q}, {tokens_k}] (the same for all heads) or one made by "
            f"transformers' own mask functions, got {list(mask.shape)} {mask.dtype}"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"attention_mask: expected a mask of bools or floating-point numbers, got {mask.dtype}")
    if mask.requires_grad:
        raise ValueError("attention_mask: expected a mask without gradient, got a bias that learns")
    mask = mask[:, 0, :, :tokens_k].expand(-1, tokens_q, -1)
    if mask.dtype != torch.bool:
        hidden = mask <= -1e4
        if not bool((hidden | (mask == 0)).all()):
            raise ValueError("attention_mask: expected 0 where a key is seen, at most -10,000 elsewhere, got a bias")
        mask = ~hidden
    return seen_in(lambda: iter(mask.split(_rows_of_block(mask.shape[0], tokens_k), 1)), tokens_k)


def seen_in(blocks: Callable[[], Iterator[Tensor]], keys: int) -> Seen:
    """What queries see, from blocks of rows.

    Raises:
        ValueError: neither intervals nor at most 31 classes of keys.
    """
    lo, hi, count = seen_by(blocks(), keys)
    if bool((count == hi - lo).all()):
        return Seen(lo, hi)
    found = classified(blocks, keys)
    if found is None:
        raise ValueError(
            "attention_mask: expected an interval of keys for each query, or at most 31 kinds of keys that the same "
            "queries see, got another pattern; attn_implementation='eager' takes it"
        )
    return found


def _rows_of_block(batch: int, keys: int) -> int:
    """Rows whose bits take about 4 MiB."""
    return max(1, (1 << 22) // max(batch * keys, 1))
