"""Positions of packed tokens in time, height and width."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from mmkernels.ops.checks import expect_tensor, integer, readable, wrong_value
from mmkernels.ops.packing import op
from mmkernels.ops.packing.checks import check_merges
from mmkernels.ops.packing.types import Spans
from mmkernels.runtime.backends import resolve

__all__ = ["mrope_position_ids"]

_INTEGERS = (torch.int64, torch.int32)
_ADVANCES = ("spatial", "largest")


def mrope_position_ids(
    cu_seqlens: Tensor,
    grid_thw: Tensor,
    starts: Tensor,
    total: int,
    *,
    merge_size: int = 2,
    advance: str = "spatial",
    time_step: Tensor | None = None,
    tokens_per_second: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Positions in time, height and width for packed tokens, each segment from 0, as Qwen2-VL's `get_rope_index`.

    A text token has one position on all three axes, one more than the text before it. The tokens of an image or clip
    that begins at position p stand at p + (t, y, x) of their place in its grid of t x h/merge_size x w/merge_size, row
    by row; `advance` says where the text behind it goes on. Nothing is inferred from token ids, and padding cannot
    shift anything: each segment stands for itself.

    Args:
        cu_seqlens: [S+1] int32 (int64 is converted), as in `segment_pool`; tokens past its end are text of their own.
        grid_thw: [N, 3] int64 (int32 is converted): each image's or clip's patches in time, height and width, in the
            order of its tokens. A model that sets a timestamp before each step of a clip (Qwen3-VL) has a grid, with
            t = 1, for each.
        starts: [N] int64 (int32 is converted): the token that each begins with, ascending. They must not overlap, nor
            cross the end of a segment. Checked as in `segment_pool`.
        total: T; on a GPU nobody may ask cu_seqlens.
        merge_size: patches along a side that one token stands for.
        advance: the rule for what follows an image or clip that begins at p. They differ only where a clip reaches
            further in time than in space; the README of this folder lists the models and releases.
            "spatial": p + max(h, w)/merge_size, however long the clip is: Qwen2-VL, Qwen2.5-VL and Qwen3-VL in
            transformers from 5.3 on.
            "largest": one more than the largest position of its tokens on any axis: the paper, the same models in
            transformers up to 5.2 and in vLLM; Qwen2.5-Omni and Qwen3-Omni in every release.
        time_step: [N] floating point: seconds from one step in time to the next, `second_per_grid_ts`; a token of step
            t stands floor(t * time_step * tokens_per_second) positions on, in float32 (float64 if given so). Default
            one position a step. Only the reference backend knows it.
        tokens_per_second: positions to a second, `tokens_per_second` or `position_id_per_seconds` in a model's
            configuration: 2 in Qwen2.5-VL as released, 25 in Qwen2.5-Omni, 13 in Qwen3-Omni. Only with time_step.
        backend: as in `pack`.

    Returns:
        [3, T] int64, on cu_seqlens' device.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
        BackendError: `backend` does not support this call.

    Source: Qwen2-VL (arXiv 2409.12191), section 2.1; transformers, `Qwen2VLModel.get_rope_index`.
    """
    merge_size = integer("merge_size", merge_size, "an integer >= 1", at_least=1)
    total = integer("total", total, "an integer >= 0", at_least=0)
    expect_tensor("cu_seqlens", cu_seqlens, "[S+1] int32", ndim=1, dtypes=_INTEGERS)
    expect_tensor("grid_thw", grid_thw, "[N, 3] int64", ndim=2, dtypes=_INTEGERS, like=cu_seqlens)
    expect_tensor("starts", starts, "[N] int64", ndim=1, dtypes=_INTEGERS, like=cu_seqlens)
    if grid_thw.shape[1] != 3:
        wrong_value("grid_thw", "[N, 3] int64", grid_thw)
    if starts.shape[0] != grid_thw.shape[0]:
        wrong_value("starts", f"one entry for each of the {grid_thw.shape[0]} grids", starts)
    if advance not in _ADVANCES:
        wrong_value("advance", '"spatial" or "largest"', advance)
    cu, starts, grid = cu_seqlens.long(), starts.long(), grid_thw.long()
    extent = torch.stack([grid[:, 0], grid[:, 1] // merge_size, grid[:, 2] // merge_size], 1)  # [N, 3]
    _check_spans(cu, starts, grid, extent.prod(1), total, merge_size)
    factors = _time_factors(time_step, tokens_per_second, advance, grid)
    reach = extent[:, 1:].amax(1)
    if advance == "largest":
        last = extent[:, 0] - 1
        reach = torch.maximum(reach, 1 + (last if factors is None else (last * factors[0] * factors[1]).long()))
    gained = torch.nn.functional.pad((reach - extent.prod(1)).cumsum(0), (1, 0))  # [N+1]
    why = None if time_step is None else "the kernels count time in whole steps: time_step is for the reference"
    limits = {"native": why, "triton": why}
    served = resolve("packing", cu.new_empty(0, dtype=torch.float32), backend, limits)
    return op.mrope(cu, Spans(starts, extent, gained, factors), total, served)


def _time_factors(time_step: Tensor | None, tokens_per_second: float, advance: str, grid: Tensor) -> Tensor | None:
    """[2, N]: what a step's number is multiplied by, one after the other, before it is rounded down.

    Two, because rounding between them counts: the models of each rule multiply in this order in transformers.
    """
    if not isinstance(tokens_per_second, Real) or not 0 < tokens_per_second < math.inf:
        wrong_value("tokens_per_second", "a finite number > 0", tokens_per_second)
    if time_step is None:
        if tokens_per_second != 1:
            wrong_value("tokens_per_second", "1 without time_step, the seconds that it multiplies", tokens_per_second)
        return None
    expect_tensor("time_step", time_step, "[N] floating point", ndim=1, like=grid)
    if time_step.shape[0] != grid.shape[0]:
        wrong_value("time_step", f"one entry for each of the {grid.shape[0]} grids", time_step)
    if readable(time_step):
        wrong = ~((time_step >= 0) & time_step.isfinite())
        if wrong.any():
            i = int(wrong.nonzero()[0])
            raise ValueError(f"time_step[{i}]: expected a finite number of seconds >= 0, got {float(time_step[i]):g}")
    seconds = time_step.to(torch.promote_types(time_step.dtype, torch.float32))
    rate = torch.full_like(seconds, float(tokens_per_second))
    pair = (seconds * rate, torch.ones_like(rate)) if advance == "spatial" else (seconds, rate)
    return torch.stack(pair)


def _check_spans(cu: Tensor, starts: Tensor, grid: Tensor, tokens: Tensor, total: int, merge: int) -> None:
    """Positive grids that merge, spans ascending, apart, and each in one segment."""
    if not all(map(readable, (cu, starts, grid))):
        return
    if cu.shape[0] == 0 or int(cu[0]) != 0 or bool((cu.diff() < 0).any()) or int(cu[-1]) > total:
        wrong_value("cu_seqlens", f"[S+1] int32 from 0, not decreasing, within total {total}", cu.tolist()[:8])
    check_merges(grid, merge)
    ends = starts + tokens
    before = torch.nn.functional.pad(ends, (1, 0))[:-1]
    wrong = starts < before
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise ValueError(
            f"starts[{i}]: expected at least {int(before[i])}, the end of the one before, got {int(starts[i])}"
        )
    boundary = torch.cat([cu, cu.new_tensor([total])])
    wrong = ends > boundary[torch.searchsorted(boundary, starts, right=True).clamp(max=len(boundary) - 1)]
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise ValueError(
            f"starts[{i}]: expected {int(tokens[i])} tokens within one segment, got them from {int(starts[i])}"
        )
