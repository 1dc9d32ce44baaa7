"""Patchify images and clips of different sizes into one token buffer, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmkernels.ops.checks import expect_tensor, integer, wrong_type, wrong_value
from mmkernels.ops.packing import op
from mmkernels.ops.packing.types import PatchSize
from mmkernels.runtime.backends import resolve

__all__ = ["patchify", "unpatchify"]

_INTEGERS = (torch.int64, torch.int32)


def _sizes(**sizes: int) -> list[int]:
    return [integer(name, size, "an integer >= 1", at_least=1) for name, size in sizes.items()]


def _on_device(grids: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """[N, 3] int64, copied from pinned memory, because a copy from pageable memory syncs."""
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
    stride = kernel size is a matmul with its flattened weight. An image's tokens are ordered by time, then row by row
    over blocks of merge_size x merge_size patches, then row by row inside a block: 1 gives raster order, 2 the order of
    Qwen2-VL's image processor. Differentiable; a permutation, so values are exact.

    Args:
        images: images [C, H, W] or clips [F, C, H, W], of one floating dtype, device and C. H and W must be multiples
            of patch_size * merge_size, F (1 for an image) of temporal_patch_size.
        patch_size: patch side in pixels.
        temporal_patch_size: frames per tubelet. (For an image in a model with 2, pass `image.expand(2, -1, -1, -1)`.)
        merge_size: side, in patches, of a block that the model later merges into one token.
        backend: as in `pack`.

    Returns:
        tokens [T, C * temporal_patch_size * patch_size**2] and grid_thw [N, 3] int64, each image's patches in time,
        height and width, on the images' device.

    Raises:
        TypeError, ValueError: a wrong argument, by name; a size that does not divide, with the image's number.
        BackendError: `backend` does not support this call.
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
    size = PatchSize(images[0].shape[-3], patch_size, temporal_patch_size, merge_size)
    served = resolve("packing", images[0], backend)
    if _needs_no_gradient(images):
        return op.patchify_images(list(images), grid_thw, size, served), grid_thw
    pixels = torch.cat([image.flatten() for image in images])
    return op.patchify(pixels, grid_thw, size, False, served), grid_thw


def _needs_no_gradient(images: Sequence[Tensor]) -> bool:
    """Such images, e.g. from a loader, are read in place; gradients need their concatenation."""
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
    """The inverse of `patchify`: one [F, C, H, W] per image, views of one buffer.

    Args:
        tokens: [T, C * temporal_patch_size * patch_size**2] floating point.
        grid_thw: each image's patches in time, height and width, on the host: N triples, or [N, 3] int64 on CPU (the
            shapes of the result follow from it).
        patch_size, temporal_patch_size, merge_size, backend: as in `patchify`.

    Raises:
        TypeError, ValueError: a wrong argument, by name; grids that do not add up to T tokens.
        BackendError: `backend` does not support this call.
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
    size = PatchSize(channels, patch_size, temporal_patch_size, merge_size)
    pixels = op.patchify(tokens, table, size, True, resolve("packing", tokens, backend))
    shapes = [(t * temporal_patch_size, channels, h * patch_size, w * patch_size) for t, h, w in grids]
    parts = pixels.split([f * c * h * w for f, c, h, w in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
