"""Images and clips of different sizes: to rows of patches in one token buffer and back, and their positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmkernels.ops.checks import expect_tensor, integer, readable, wrong_type, wrong_value
from mmkernels.ops.packing import op
from mmkernels.runtime.backends import resolve

__all__ = ["mrope_position_ids", "patchify", "unpatchify"]

_INTEGERS = (torch.int64, torch.int32)
_ADVANCES = ("spatial", "largest")


def _sizes(**sizes: int) -> list[int]:
    return [integer(name, size, "an integer >= 1", at_least=1) for name, size in sizes.items()]


def _on_device(grids: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """[N, 3] int64, sent from pinned memory: a transfer from pageable memory waits for the device."""
    table = torch.tensor(grids, dtype=torch.int64).reshape(-1, 3)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def patchify(
    images: Sequence[Tensor],
    patch_size: int,
    *,
    temporal_patch_size: int = 1,
    merge_size: int = 1,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Cut images and clips of different sizes into patches, in one buffer: no padding, no cropping, no resizing.

    A token is one patch, flattened as [C, temporal_patch_size, patch_size, patch_size], so that a convolution with
    stride = kernel is a matrix product with its weight flattened. An image's tokens go by time, then row by row over
    blocks of merge_size x merge_size patches, then row by row inside a block: with 1 the usual raster, with 2 the order
    of Qwen2-VL's image processor. Differentiable; a permutation, so bits are copied.

    Args:
        images: images [C, H, W] or clips [F, C, H, W], of one floating dtype, device and C. H and W must be multiples
            of patch_size * merge_size, F (1 for an image) of temporal_patch_size.
        patch_size: pixels along a side of a patch.
        temporal_patch_size: frames in a tubelet. (An image shown to a model with 2 is `image.expand(2, -1, -1, -1)`.)
        merge_size: patches along a side of a block that is merged into one token later on.
        backend: as in `pack`.

    Returns:
        tokens [T, C * temporal_patch_size * patch_size**2] and grid_thw [N, 3] int64, each image's patches in time,
        height and width, on the images' device.

    Raises:
        TypeError, ValueError: a wrong argument, by name; a size that does not divide, with the image's number.
        BackendError: the backend asked for cannot serve.
    """
    patch_size, temporal_patch_size, merge_size = _sizes(
        patch_size=patch_size, temporal_patch_size=temporal_patch_size, merge_size=merge_size
    )
    if isinstance(images, Tensor) or not isinstance(images, Sequence) or len(images) == 0:
        wrong_type("images", "a sequence of at least one tensor [C, H, W] or [F, C, H, W]", images)
    grids = []
    for i, image in enumerate(images):
        expect_tensor(f"images[{i}]", image, "[C, H, W] or [F, C, H, W] floating point", ndim=(3, 4))
        if image.dtype != images[0].dtype or image.device != images[0].device or image.shape[-3] != images[0].shape[-3]:
            first = images[0]
            wrong_value(f"images[{i}]", f"{first.shape[-3]} channels, {first.dtype} on {first.device}", image)
        frames, (height, width) = image.shape[0] if image.ndim == 4 else 1, image.shape[-2:]
        side = patch_size * merge_size
        if height % side or width % side or frames % temporal_patch_size or image.numel() == 0:
            expected = f"H and W that are multiples of {side} (patch_size x merge_size) and a multiple of "
            wrong_value(f"images[{i}]", f"{expected}{temporal_patch_size} frames (temporal_patch_size)", image)
        grids.append((frames // temporal_patch_size, height // patch_size, width // patch_size))
    grid_thw = _on_device(grids, images[0].device)
    sizes = (images[0].shape[-3], patch_size, temporal_patch_size, merge_size)
    served = resolve("packing", images[0], backend)
    if _needs_no_gradient(images):
        return op.patchify_images(list(images), grid_thw, *sizes, served), grid_thw
    pixels = torch.cat([image.flatten() for image in images])
    return op.patchify(pixels, grid_thw, *sizes, False, served), grid_thw


def _needs_no_gradient(images: Sequence[Tensor]) -> bool:
    """As pixels from a loader: they are read where they lie. A gradient goes through their concatenation."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    return not (torch.is_grad_enabled() and any(image.requires_grad for image in images))


def unpatchify(
    tokens: Tensor,
    grid_thw: Sequence[tuple[int, int, int]] | Tensor,
    patch_size: int,
    *,
    temporal_patch_size: int = 1,
    merge_size: int = 1,
    backend: str | None = None,
) -> list[Tensor]:
    """The inverse of `patchify`: one [F, C, H, W] for each image, views of one buffer.

    Args:
        tokens: [T, C * temporal_patch_size * patch_size**2] floating point.
        grid_thw: each image's patches in time, height and width, on the host: N triples, or [N, 3] int64 on CPU (the
            shapes of the result follow from it).
        patch_size, temporal_patch_size, merge_size, backend: as in `patchify`.

    Raises:
        TypeError, ValueError: a wrong argument, by name; grids that do not add up to T tokens.
        BackendError: the backend asked for cannot serve.
    """
    patch_size, temporal_patch_size, merge_size = _sizes(
        patch_size=patch_size, temporal_patch_size=temporal_patch_size, merge_size=merge_size
    )
    expect_tensor("tokens", tokens, "[T, C * temporal_patch_size * patch_size**2] floating point", ndim=2)
    if isinstance(grid_thw, Tensor):
        expect_tensor("grid_thw", grid_thw, "[N, 3] int64 on the host", ndim=2, dtypes=_INTEGERS)
        if grid_thw.device.type != "cpu" or grid_thw.shape[1] != 3:
            wrong_value("grid_thw", "[N, 3] int64 on the host", grid_thw)
        grid_thw = grid_thw.tolist()
    grids = [tuple(integer(f"grid_thw[{i}]", n, "integers") for n in grid) for i, grid in enumerate(grid_thw)]
    row = temporal_patch_size * patch_size**2
    channels, rest = divmod(tokens.shape[1], row)
    if rest or channels == 0:
        wrong_value("tokens", f"rows of C x {row} elements (temporal_patch_size x patch_size^2)", tokens)
    for i, grid in enumerate(grids):
        if len(grid) != 3 or min(grid) < 1 or grid[1] % merge_size or grid[2] % merge_size:
            wrong_value(f"grid_thw[{i}]", f"(t, h, w) >= 1, h and w multiples of merge_size {merge_size}", grid)
    total = sum(t * h * w for t, h, w in grids)
    if total != tokens.shape[0]:
        wrong_value("tokens", f"the {total} rows of grid_thw", tokens)
    table = _on_device(grids, tokens.device)
    sizes = (channels, patch_size, temporal_patch_size, merge_size)
    pixels = op.patchify(tokens, table, *sizes, True, resolve("packing", tokens, backend))
    shapes = [(t * temporal_patch_size, channels, h * patch_size, w * patch_size) for t, h, w in grids]
    parts = pixels.split([f * c * h * w for f, c, h, w in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


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
        BackendError: the backend asked for cannot serve.

    Source: Qwen2-VL (arXiv 2409.12191), section 2.1; transformers, `Qwen2VLModel.get_rope_index`.
    """
    (merge_size,) = _sizes(merge_size=merge_size)
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
    return op.mrope(cu, starts, extent, gained, factors, total, served)


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
    wrong = (grid < 1).any(1) | (grid[:, 1:] % merge != 0).any(1)
    if wrong.any():
        i = int(wrong.nonzero()[0])
        expected = f"t, h and w >= 1, h and w multiples of merge_size {merge}"
        raise ValueError(f"grid_thw[{i}]: expected {expected}, got {grid[i].tolist()}")
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
