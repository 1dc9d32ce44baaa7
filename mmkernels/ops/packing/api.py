"""Public functions that move and pool rows of packed tokens; image functions are in vision.py and mrope.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmkernels.ops.checks import FLOATING, expect_tensor, expect_true, integer, narrowed, wrong_type, wrong_value
from mmkernels.ops.dtypes import compute_dtype
from mmkernels.ops.packing import op
from mmkernels.ops.packing.types import Sources
from mmkernels.runtime.backends import resolve

__all__ = ["embed_splice", "pack", "pad", "segment_pool", "unpack", "unpad"]

_INTEGERS = (torch.int64, torch.int32)


def _flat(x: Tensor) -> Tensor:
    """[R, ...] -> [R, E]."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def _check_rows(name: str, x: Tensor, expected: str, least_dims: int = 1) -> None:
    expect_tensor(name, x, expected)
    if x.ndim < least_dims:
        wrong_value(name, expected, x)


def _check_cu_seqlens(cu_seqlens: Tensor, x: Tensor) -> Tensor:
    expect_tensor("cu_seqlens", cu_seqlens, "[S+1] int32", ndim=1, dtypes=_INTEGERS, like=x)
    if cu_seqlens.shape[0] == 0:
        wrong_value("cu_seqlens", "[S+1] int32 with at least one entry", cu_seqlens)
    if x.shape[0] > torch.iinfo(torch.int32).max:
        wrong_value("x", "fewer than 2^31 rows", x)
    return narrowed("cu_seqlens", cu_seqlens, torch.int32)


def pack(sources: Tensor | Sequence[Tensor], index: Tensor, *, backend: str | None = None) -> Tensor:
    """Gather rows into a packed buffer: `out[t] = sources[index[t]]`, zeros where `index[t] == -1`.

    Differentiable in the sources: a row indexed several times receives the sum of its gradients (in float32 for
    low-precision dtypes, in ascending t: bitwise reproducible).

    Args:
        sources: [R, ...] floating point; or a sequence of tensors with equal trailing dimensions and dtype, whose rows
            are numbered consecutively. Up to four are read in place; more are concatenated first.
        index: [T] int64 (int32 is converted), each in [-1, R). Always checked on a CPU; on a GPU, where the check would
            sync, only with MMKERNELS_VALIDATE=1.
        backend: None picks the fastest one that supports the call; or one of "native", "triton", "reference".

    Returns:
        [T, ...], contiguous.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
        BackendError: `backend` does not support this call.
    """
    parts = _sources(sources)
    first = parts[0]
    expect_tensor("index", index, "[T] int64", ndim=1, dtypes=_INTEGERS, like=first)
    if len(parts) > len(Sources._fields):
        parts = [torch.cat(parts)]
    flat = Sources(*(_flat(part) for part in parts))
    out = op.gather(flat, index.long(), resolve("packing", first, backend))
    return out.reshape(index.shape[0], *first.shape[1:])


def _sources(sources: Tensor | Sequence[Tensor]) -> list[Tensor]:
    expected = "[R, ...] floating point"
    if isinstance(sources, Tensor):
        _check_rows("sources", sources, expected)
        return [sources]
    if not isinstance(sources, Sequence) or len(sources) == 0:
        wrong_type("sources", "a tensor or a sequence of at least one tensor", sources)
    for i, source in enumerate(sources):
        _check_rows(f"sources[{i}]", source, expected)
        first = sources[0]
        if source.shape[1:] != first.shape[1:] or source.dtype != first.dtype or source.device != first.device:
            wrong_value(f"sources[{i}]", f"rows like those of sources[0], {list(first.shape)} {first.dtype}", source)
    return list(sources)


def embed_splice(
    token_ids: Tensor,
    table: Tensor,
    features: Tensor,
    dst_index: Tensor,
    *,
    padding_idx: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Embedding lookup with features replacing placeholders: `out = table[token_ids]; out[dst_index] = features`.

    One pass over the tokens, without a mask or intermediates. The table's gradient sums its tokens' gradients (in
    float32 for low-precision dtypes, in ascending order: bitwise reproducible); the features' gradient is a gather.
    Gradients that are not required are not computed.

    Args:
        token_ids: [T] int64 (int32 is converted), each in [0, V), except where a feature goes: there any value, such as
            a placeholder outside the vocabulary.
        table: [V, E] floating point.
        features: [F, E], of the table's dtype.
        dst_index: [F] int64 (int32 is converted): the token that each feature replaces, each token at most once; -1
            drops the feature. Bounds and repeats are always checked on a CPU; on a GPU, where the check would sync,
            only with MMKERNELS_VALIDATE=1 (unchecked, the last of several features wins).
        padding_idx: a row of the table without gradient, as in `torch.nn.Embedding`.
        backend: as in `pack`.

    Returns:
        [T, E].

    Raises:
        TypeError, ValueError: a wrong argument, by name.
        BackendError: `backend` does not support this call.
    """
    expect_tensor("table", table, "[V, E] floating point", ndim=2)
    expected = f"[F, {table.shape[1]}] {str(table.dtype).removeprefix('torch.')}"
    expect_tensor("features", features, expected, ndim=2, like=table, dtypes=(table.dtype,))
    if features.shape[1] != table.shape[1]:
        wrong_value("features", expected, features)
    expect_tensor("token_ids", token_ids, "[T] int64", ndim=1, dtypes=_INTEGERS, like=table)
    expect_tensor("dst_index", dst_index, "[F] int64", ndim=1, dtypes=_INTEGERS, like=table)
    if dst_index.shape[0] != features.shape[0]:
        wrong_value("dst_index", f"one entry for each of the {features.shape[0]} features", dst_index)
    if padding_idx is not None:
        expected = f"None or a row in [0, {table.shape[0]})"
        padding_idx = integer("padding_idx", padding_idx, expected, at_least=0)
        if padding_idx >= table.shape[0]:
            wrong_value("padding_idx", expected, padding_idx)
    served = resolve("packing", table, backend)
    return op.embed_splice(table, features, token_ids.long(), dst_index.long(), padding_idx, served)[0]


def unpack(
    packed: Tensor,
    index: Tensor,
    rows: int | Sequence[int] | None = None,
    *,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Scatter packed rows, the reverse of `pack`: `out[r] = sum of packed[t] over t with index[t] == r`.

    If the index contains each row once, this is the inverse of `pack`. Rows it does not contain are 0; a row it
    contains several times receives the sum (in float32 for low-precision dtypes, in ascending t: bitwise reproducible).

    Args:
        packed: [T, ...] floating point.
        index: [T] int64 (int32 is converted), each in [-1, R); rows with -1 are dropped. Checked as in `pack`.
        rows: R; or a sequence of sizes that sum to R, for one tensor each; None for R = T.
        backend: as in `pack`.

    Returns:
        [R, ...], or a tuple of [rows[i], ...] if `rows` is a sequence.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
        BackendError: `backend` does not support this call.
    """
    _check_rows("packed", packed, "[T, ...] floating point")
    expect_tensor("index", index, "[T] int64", ndim=1, dtypes=_INTEGERS, like=packed)
    if index.shape[0] != packed.shape[0]:
        wrong_value("index", f"one entry for each of the {packed.shape[0]} packed rows", index)
    several = isinstance(rows, (Sequence, np.ndarray))
    given: Any = rows if several else [packed.shape[0] if rows is None else rows]
    sizes = [integer("rows", size, "sizes >= 0", at_least=0) for size in given]
    out = op.scatter(_flat(packed), index.long(), sum(sizes), resolve("packing", packed, backend))
    out = out.reshape(sum(sizes), *packed.shape[1:])
    return out.split(sizes) if several else out


def segment_pool(
    x: Tensor,
    cu_seqlens: Tensor,
    mode: str = "mean",
    *,
    weights: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Reduce each segment to one row: `out[s] = mode(x[cu_seqlens[s]:cu_seqlens[s+1]])`.

    Sums are taken in float32 for low-precision dtypes. An empty segment gives 0 in every mode and passes no gradient.
    "max" is taken per feature; its gradient goes to the first of equal rows, and NaN beats every number. "weighted" is
    the sum of weights[t] x[t], differentiable in both; for a weighted mean divide the weights by their segment's sum.
    Rows past `cu_seqlens[-1]` (padding, say) belong to no segment and get gradient 0.

    Args:
        x: [T, ...] floating point.
        cu_seqlens: [S+1] int32 (int64 is converted): starts at 0, non-decreasing, ends at most at T. Always checked on
            a CPU; on a GPU only with MMKERNELS_VALIDATE=1.
        mode: "mean", "sum", "max", "first" (the segment's first row) or "weighted".
        weights: [T] floating point, for "weighted" only; converted to float32 (float64 for float64 rows).
        backend: as in `pack`.

    Returns:
        [S, ...] in x's dtype.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
        BackendError: `backend` does not support this call.
    """
    _check_rows("x", x, "[T, ...] floating point")
    modes = (*op.MODES, "weighted")
    if mode not in modes:
        wrong_value("mode", f"one of {', '.join(modes)}", mode)
    if (weights is not None) != (mode == "weighted"):
        wrong_value("weights", "[T] floating point" if weights is None else f'None for mode "{mode}"', weights)
    cu_seqlens = _check_cu_seqlens(cu_seqlens, x)
    served = resolve("packing", x, backend)
    if weights is None:
        out, _ = op.segment_pool(_flat(x), cu_seqlens, mode, served)
    else:
        expected = f"[{x.shape[0]}] floating point"
        expect_tensor("weights", weights, expected, ndim=1, dtypes=FLOATING, like=x)
        if weights.shape[0] != x.shape[0]:
            wrong_value("weights", expected, weights)
        wide = weights.to(compute_dtype(x.dtype))
        out = op.weighted_pool(_flat(x), wide, cu_seqlens, served)
    return out.reshape(cu_seqlens.shape[0] - 1, *x.shape[1:])


def pad(x: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None, *, backend: str | None = None) -> Tensor:
    """Packed to padded: `out[s, j] = x[cu_seqlens[s] + j]` inside segment s, zeros past its end.

    Args:
        x: [T, ...] floating point.
        cu_seqlens: [S+1] int32 (int64 is converted), as in `segment_pool`.
        max_seqlen: L. None takes the longest segment of cu_seqlens, only on a CPU: on a GPU that would sync. No segment
            may be longer.
        backend: as in `pack`.

    Returns:
        [S, L, ...].

    Raises:
        TypeError, ValueError: a wrong argument, by name. A segment longer than `max_seqlen` raises RuntimeError where
            only the device or a compiled graph can see it.
        BackendError: `backend` does not support this call.
    """
    _check_rows("x", x, "[T, ...] floating point")
    cu_seqlens = _check_cu_seqlens(cu_seqlens, x)
    begin, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff()
    if max_seqlen is None:
        if x.device.type != "cpu":
            wrong_value("max_seqlen", f"the longest segment, for tensors on {x.device}", max_seqlen)
        max_seqlen = int(lengths.max()) if lengths.shape[0] else 0
    max_seqlen = integer("max_seqlen", max_seqlen, "an integer >= 0", at_least=0)
    expect_true(lengths <= max_seqlen, f"max_seqlen: expected at least the longest segment, got {max_seqlen}")
    at = torch.arange(max_seqlen, device=x.device)  # [L]
    index = torch.where(at < lengths[:, None], begin[:, None] + at, -1)  # [S, L]
    out = pack(x, index.flatten(), backend=backend)
    return out.reshape(*index.shape, *x.shape[1:])


def unpad(x: Tensor, keep: Tensor, total: int | None = None, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Padded to packed: the rows selected by `keep`, sample by sample, in order.

    Args:
        x: [B, L, ...] floating point.
        keep: a mask [B, L] bool with any pattern; or lengths [B] int64 or int32 in [0, L], which keep each sample's
            first rows.
        total: T, rows of the result: at least the rows kept; the rest are zeros at the end. None counts them, only on a
            CPU: on a GPU that would sync.
        backend: as in `pack`.

    Returns:
        tokens [T, ...] and cu_seqlens [B+1] int32, whose last entry is the number of rows kept.

    Raises:
        TypeError, ValueError: a wrong argument, by name. A `total` that is too small raises RuntimeError where only the
            device or a compiled graph can see it.
        BackendError: `backend` does not support this call.
    """
    _check_rows("x", x, "[B, L, ...] floating point", least_dims=2)
    batch, longest = x.shape[:2]
    expected = f"a mask [{batch}, {longest}] bool or lengths [{batch}] int64"
    expect_tensor("keep", keep, expected, ndim=(1, 2), dtypes=(torch.bool, *_INTEGERS), like=x)
    if keep.shape != x.shape[: keep.ndim] or (keep.ndim == 2) != (keep.dtype == torch.bool):
        wrong_value("keep", expected, keep)
    if keep.ndim == 1:
        in_range = ((keep >= 0) & (keep <= longest)).all()
        expect_true(in_range, f"keep: expected lengths in [0, {longest}]")
        keep = torch.arange(longest, device=x.device) < keep[:, None]
    counts = torch.cat([keep.new_zeros(1, dtype=torch.int64), keep.sum(1).cumsum(0)])
    if total is None:
        if x.device.type != "cpu":
            wrong_value("total", f"the number of rows kept, for tensors on {x.device}", total)
        total = int(counts[-1])
    total = integer("total", total, "an integer >= 0", at_least=0)
    expect_true(counts[-1] <= total, f"total: expected at least the number of rows kept, got {total}")
    # Each kept row writes its index to its packed position; dropped rows write past the end.
    keep = keep.flatten()
    place = torch.where(keep, keep.cumsum(0) - 1, total)
    index = place.new_full((total + 1,), -1).scatter(0, place, torch.arange(batch * longest, device=x.device))
    tokens = pack(x.flatten(0, 1), index[:total], backend=backend)
    return tokens, counts.to(torch.int32)
