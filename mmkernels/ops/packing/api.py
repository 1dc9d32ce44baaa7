"""Public functions that move and pool rows of packed tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from mmkernels.ops._checks import expect_tensor, not_yet, wrong_type, wrong_value
from mmkernels.ops.packing import op
from mmkernels.runtime.backends import resolve

__all__ = ["pack", "pad", "segment_pool", "unpack", "unpad"]

_INTEGERS = (torch.int64, torch.int32)


def _flat(x: torch.Tensor) -> torch.Tensor:
    """[R, ...] -> [R, E]."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def _check_rows(name: str, x: torch.Tensor, expected: str, least_dims: int = 1) -> None:
    expect_tensor(name, x, expected)
    if x.ndim < least_dims:
        wrong_value(name, expected, x)


def _check_cu_seqlens(cu_seqlens: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    expect_tensor("cu_seqlens", cu_seqlens, "[S+1] int32", ndim=1, dtypes=_INTEGERS, like=x)
    if cu_seqlens.shape[0] == 0:
        wrong_value("cu_seqlens", "[S+1] int32 with at least one entry", cu_seqlens)
    if x.shape[0] > torch.iinfo(torch.int32).max:
        wrong_value("x", "fewer than 2^31 rows", x)
    return cu_seqlens.to(torch.int32)


def pack(
    sources: torch.Tensor | Sequence[torch.Tensor], index: torch.Tensor, *, backend: str | None = None
) -> torch.Tensor:
    """Gather rows into a packed buffer: `out[t] = sources[index[t]]`, zeros where `index[t] == -1`.

    Differentiable in the sources: a row named several times receives the sum of its gradients (taken in float32 for
    low-precision dtypes, in ascending t: bitwise reproducible).

    Args:
        sources: [R, ...] floating point; or a sequence of tensors with equal trailing dimensions and dtype, whose rows
            are numbered one after the other (they are concatenated first).
        index: [T] int64 (int32 is converted), each in [-1, R). Checked on CPU always; on a GPU, where the check would
            wait for the device, when the environment has MMKERNELS_VALIDATE=1.
        backend: None for the fastest that can serve, or one of "native", "triton", "reference".

    Returns:
        [T, ...], contiguous.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
        BackendError: the backend asked for cannot serve.
    """
    source = _one_source(sources)
    expect_tensor("index", index, "[T] int64", ndim=1, dtypes=_INTEGERS, like=source)
    out = op.gather(_flat(source), index.long(), resolve("packing", source, backend))
    return out.reshape(index.shape[0], *source.shape[1:])


def _one_source(sources: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    expected = "[R, ...] floating point"
    if isinstance(sources, torch.Tensor):
        _check_rows("sources", sources, expected)
        return sources
    if not isinstance(sources, Sequence) or len(sources) == 0:
        wrong_type("sources", "a tensor or a sequence of at least one tensor", sources)
    for i, source in enumerate(sources):
        _check_rows(f"sources[{i}]", source, expected)
        first = sources[0]
        if source.shape[1:] != first.shape[1:] or source.dtype != first.dtype or source.device != first.device:
            wrong_value(f"sources[{i}]", f"rows like those of sources[0], {list(first.shape)} {first.dtype}", source)
    return sources[0] if len(sources) == 1 else torch.cat(list(sources))


def unpack(
    packed: torch.Tensor,
    index: torch.Tensor,
    rows: int | Sequence[int] | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Send packed rows back to where `pack` took them: `out[r] = sum of packed[t] over the t with index[t] == r`.

    With an index that names each row once this is the inverse of `pack`; rows that nobody names are 0, and a row named
    several times receives the sum (in float32 for low-precision dtypes, in ascending t: bitwise reproducible).

    Args:
        packed: [T, ...] floating point.
        index: [T] int64 (int32 is converted), each in [-1, R); rows with -1 are left out. Checked as in `pack`.
        rows: R; or a sequence of sizes whose sum is R, to get one tensor for each; None for R = T.
        backend: as in `pack`.

    Returns:
        [R, ...], or a tuple of [rows[i], ...] if `rows` is a sequence.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
        BackendError: the backend asked for cannot serve.
    """
    _check_rows("packed", packed, "[T, ...] floating point")
    expect_tensor("index", index, "[T] int64", ndim=1, dtypes=_INTEGERS, like=packed)
    if index.shape[0] != packed.shape[0]:
        wrong_value("index", f"one entry for each of the {packed.shape[0]} packed rows", index)
    sizes = [packed.shape[0]] if rows is None else [rows] if isinstance(rows, int | torch.SymInt) else list(rows)
    if any(size < 0 for size in sizes):
        wrong_value("rows", "sizes >= 0", rows)
    out = op.scatter(_flat(packed), index.long(), sum(sizes), resolve("packing", packed, backend))
    out = out.reshape(sum(sizes), *packed.shape[1:])
    return out if rows is None or isinstance(rows, int | torch.SymInt) else out.split(sizes)


def segment_pool(
    x: torch.Tensor, cu_seqlens: torch.Tensor, mode: str = "mean", *, backend: str | None = None
) -> torch.Tensor:
    """Pool each segment's rows to one: `out[s] = mode(x[cu_seqlens[s]:cu_seqlens[s+1]])`.

    Sums are taken in float32 for low-precision dtypes. An empty segment gives 0 in every mode and passes no gradient.
    "max" is taken per feature; its gradient goes to the first of equal rows, and a NaN wins over every number. Rows
    past `cu_seqlens[-1]` (padding, say) belong to no segment and get gradient 0.

    Args:
        x: [T, ...] floating point.
        cu_seqlens: [S+1] int32 (int64 is converted): begins with 0, does not decrease, ends with at most T. Checked on
            CPU always; on a GPU when the environment has MMKERNELS_VALIDATE=1.
        mode: "mean", "sum", "max" or "first" (the segment's first row); "weighted" is not there yet.
        backend: as in `pack`.

    Returns:
        [S, ...] in x's dtype.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
        BackendError: the backend asked for cannot serve.
        NotImplementedError: mode "weighted".
    """
    _check_rows("x", x, "[T, ...] floating point")
    if mode == "weighted":
        not_yet("mode", mode)
    if mode not in op.MODES:
        wrong_value("mode", f"one of {', '.join(op.MODES)}", mode)
    cu_seqlens = _check_cu_seqlens(cu_seqlens, x)
    out, _ = op.segment_pool(_flat(x), cu_seqlens, mode, resolve("packing", x, backend))
    return out.reshape(cu_seqlens.shape[0] - 1, *x.shape[1:])


def pad(
    x: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int | None = None, *, backend: str | None = None
) -> torch.Tensor:
    """Packed to padded: `out[s, j] = x[cu_seqlens[s] + j]` inside segment s, zeros past its end.

    Args:
        x: [T, ...] floating point.
        cu_seqlens: [S+1] int32 (int64 is converted), as in `segment_pool`.
        max_seqlen: L. None reads the longest segment from cu_seqlens, on CPU only: on a GPU that would wait for the
            device. No segment may be longer.
        backend: as in `pack`.

    Returns:
        [S, L, ...].

    Raises:
        TypeError, ValueError: a wrong argument, by name. A segment longer than `max_seqlen` is a RuntimeError where
            only the device or a compiled graph can see it.
        BackendError: the backend asked for cannot serve.
    """
    _check_rows("x", x, "[T, ...] floating point")
    cu_seqlens = _check_cu_seqlens(cu_seqlens, x)
    begin, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff()
    if max_seqlen is None:
        if x.device.type != "cpu":
            wrong_value("max_seqlen", f"the longest segment, for tensors on {x.device}", max_seqlen)
        max_seqlen = int(lengths.max()) if lengths.shape[0] else 0
    _check_true((lengths <= max_seqlen).all(), f"max_seqlen: expected at least the longest segment, got {max_seqlen}")
    at = torch.arange(max_seqlen, device=x.device)  # [L]
    index = torch.where(at < lengths[:, None], begin[:, None] + at, -1)  # [S, L]
    out = pack(x, index.flatten(), backend=backend)
    return out.reshape(*index.shape, *x.shape[1:])


def unpad(
    x: torch.Tensor, keep: torch.Tensor, total: int | None = None, *, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded to packed: the rows that `keep` names, sample after sample, in order.

    Args:
        x: [B, L, ...] floating point.
        keep: a mask [B, L] bool, of any shape and not of prefixes only; or lengths [B] int64 or int32 in [0, L], which
            keep each sample's first rows.
        total: T, rows of the result: at least the rows kept, the rest being zeros at the end. None counts them, on CPU
            only: on a GPU that would wait for the device.
        backend: as in `pack`.

    Returns:
        tokens [T, ...] and cu_seqlens [B+1] int32, which ends with the rows kept.

    Raises:
        TypeError, ValueError: a wrong argument, by name. A `total` that is too small is a RuntimeError where only the
            device or a compiled graph can see it.
        BackendError: the backend asked for cannot serve.
    """
    _check_rows("x", x, "[B, L, ...] floating point", least_dims=2)
    batch, longest = x.shape[:2]
    expected = f"a mask [{batch}, {longest}] bool or lengths [{batch}] int64"
    expect_tensor("keep", keep, expected, ndim=(1, 2), dtypes=(torch.bool, *_INTEGERS), like=x)
    if keep.shape != x.shape[: keep.ndim] or (keep.ndim == 2) != (keep.dtype == torch.bool):
        wrong_value("keep", expected, keep)
    if keep.ndim == 1:
        in_range = ((keep >= 0) & (keep <= longest)).all()
        _check_true(in_range, f"keep: expected lengths in [0, {longest}]")
        keep = torch.arange(longest, device=x.device) < keep[:, None]
    counts = torch.cat([keep.new_zeros(1, dtype=torch.int64), keep.sum(1).cumsum(0)])
    if total is None:
        if x.device.type != "cpu":
            wrong_value("total", f"the number of rows kept, for tensors on {x.device}", total)
        total = int(counts[-1])
    _check_true(counts[-1] <= total, f"total: expected at least the number of rows kept, got {total}")
    # Each kept row writes its number to its place; the others write to one place past the end.
    keep = keep.flatten()
    place = torch.where(keep, keep.cumsum(0) - 1, total)
    index = place.new_full((total + 1,), -1).scatter(0, place, torch.arange(batch * longest, device=x.device))
    tokens = pack(x.flatten(0, 1), index[:total], backend=backend)
    return tokens, counts.to(torch.int32)


def _check_true(condition: torch.Tensor, message: str) -> None:
    """Raise ValueError on CPU; where the value cannot be read without waiting or breaking a graph, assert on device."""
    if condition.device.type == "cpu" and not torch.compiler.is_compiling() and not _is_transformed(condition):
        if not bool(condition):
            raise ValueError(message)
    else:
        torch._assert_async(condition, message)


def _is_transformed(tensor: torch.Tensor) -> bool:
    """Whether functorch's vmap hides the tensor's value."""
    return torch._C._functorch.is_batchedtensor(tensor)
