"""M-RoPE positions of packed tokens: time, height, width."""

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
    """Positions in time, height and width of packed tokens, each segment starting at 0, as Qwen2-VL's `get_rope_index`.

    A text token has the same position on all three axes, one more than the text before it. A token at (t, y, x) in the
    grid of an image or clip (t x h/merge_size x w/merge_size, row by row) that begins at position p has position p +
    (t, y, x); `advance` selects where the text after it continues. Nothing is inferred from token ids, and padding
    shifts nothing: segments are independent.

    Args:
        cu_seqlens: [S+1] int32 (int64 is converted), as in `segment_pool`; tokens past its end count as a separate
            text.
        grid_thw: [N, 3] int64 (int32 is converted): each image's or clip's patches in time, height and width, in the
            order of its tokens. For a model with a timestamp before each step of a clip (Qwen3-VL), pass one grid with
            t = 1 per step.
        starts: [N] int64 (int32 is converted): the first token of each, ascending. They must not overlap or cross the
            end of a segment. Checked as in `segment_pool`.
        total: T; required because reading cu_seqlens on a GPU would sync.
        merge_size: patches per token along each side.
        advance: the rule for the position after an image or clip that begins at p. The rules differ only if a clip is
            longer in time than in space; the README of this folder lists the models and releases. "spatial": p + max(h,
            w)/merge_size, for clips of any length: Qwen2-VL, Qwen2.5-VL and Qwen3-VL in transformers from 5.3 on.
            "largest": one more than the largest position of its tokens on any axis: the paper, the same models in
            transformers up to 5.2 and in vLLM; Qwen2.5-Omni and Qwen3-Omni in every release.
        time_step: [N] floating point: seconds between temporal steps, `second_per_grid_ts`; a token of step t has time
            position floor(t * time_step * tokens_per_second), in float32 (float64 for float64). Default: one position
            per step. Only the reference backend supports it.
        tokens_per_second: positions per second, `tokens_per_second` or `position_id_per_seconds` in a model's
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
    why = None if time_step is None else "time_step is supported only by the reference"
    limits = {"native": why, "triton": why}
    served = resolve("packing", cu.new_empty(0, dtype=torch.float32), backend, limits)
    return op.mrope(cu, Spans(starts, extent, gained, factors), total, served)


def _time_factors(time_step: Tensor | None, tokens_per_second: float, advance: str, grid: Tensor) -> Tensor | None:
    """[2, N]: the two factors by which a step index is multiplied, in order, before rounding down.

    Two, because the rounding between them matters: transformers multiplies in this order for the models of each rule.
    """
    if not isinstance(tokens_per_second, Real) or not 0 < tokens_per_second < math.inf:
        wrong_value("tokens_per_second", "a finite number > 0", tokens_per_second)
    if time_step is None:
        if tokens_per_second != 1:
            wrong_value("tokens_per_second", "1 without time_step", tokens_per_second)
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
    """Positive grids divisible by merge; spans ascending, disjoint, each within one segment."""
    if not all(map(readable, (cu, starts, grid))):
        return
    if cu.shape[0] == 0 or int(cu[0]) != 0 or bool((cu.diff() < 0).any()) or int(cu[-1]) > total:
        wrong_value("cu_seqlens", f"[S+1] int32 starting at 0, non-decreasing, within total {total}", cu.tolist()[:8])
    check_merges(grid, merge)
    ends = starts + tokens
    before = torch.nn.functional.pad(ends, (1, 0))[:-1]
    wrong = starts < before
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise ValueError(
            f"starts[{i}]: expected at least {int(before[i])}, the end of the previous span, got {int(starts[i])}"
        )
    boundary = torch.cat([cu, cu.new_tensor([total])])
    wrong = ends > boundary[torch.searchsorted(boundary, starts, right=True).clamp(max=len(boundary) - 1)]
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise ValueError(
            f"starts[{i}]: expected its {int(tokens[i])} tokens within one segment, got start {int(starts[i])}"
        )
