"""Value checks of the packing ops, done only where values can be read without a sync."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.checks import readable
from mmkernels.ops.packing.types import PatchSize

__all__ = ["check_cu_seqlens", "check_grid", "check_images", "check_index", "check_merges", "check_splice"]


def check_index(name: str, index: Tensor, rows: int) -> None:
    """Each entry in [-1, rows)."""
    if index.numel() == 0 or not readable(index):
        return
    low, high = (int(value) for value in torch.aminmax(index))
    if low < -1 or high >= rows:
        at = int(((index < -1) | (index >= rows)).nonzero()[0])
        raise ValueError(f"{name}: expected each in [-1, {rows}), got {int(index[at])} at position {at}")


def check_cu_seqlens(cu_seqlens: Tensor, rows: int, name: str = "cu_seqlens") -> None:
    """Starts at 0, non-decreasing, within the rows."""
    if not readable(cu_seqlens):
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last > rows:
        raise ValueError(f"{name}: expected to start at 0 and end within [0, {rows}], got {first} ... {last}")
    falls = cu_seqlens[1:] < cu_seqlens[:-1]
    if falls.any():
        at = int(falls.nonzero()[0])
        raise ValueError(
            f"{name}: expected non-decreasing entries, got {int(cu_seqlens[at])}, {int(cu_seqlens[at + 1])} at {at}"
        )


def check_splice(vocabulary: int, token_ids: Tensor, dst_index: Tensor) -> None:
    """Bounds, and no token replaced twice. Ids of replaced tokens are not checked."""
    tokens = token_ids.shape[0]
    check_index("dst_index", dst_index, tokens)
    if not readable(dst_index):
        return
    named = torch.bincount(dst_index[dst_index >= 0], minlength=tokens)
    if named.numel() and int(named.max()) > 1:
        at = int(named.argmax())
        positions = (dst_index == at).nonzero()[:2, 0].tolist()
        raise ValueError(
            f"dst_index: expected each token once, got {at} at positions {positions[0]} and {positions[1]}"
        )
    wrong = ((token_ids < 0) | (token_ids >= vocabulary)) & (named == 0)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"token_ids: expected each in [0, {vocabulary}) where no feature goes, got {int(token_ids[at])} at "
            f"position {at}"
        )


def check_merges(grid_thw: Tensor, merge: int) -> None:
    """Grids of at least one patch, in blocks of merge x merge. The caller ensures that values may be read."""
    wrong = (grid_thw < 1).any(1) | (grid_thw[:, 1:] % merge != 0).any(1)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        expected = f"t, h and w >= 1, h and w multiples of merge_size {merge}"
        raise ValueError(f"grid_thw[{at}]: expected {expected}, got {grid_thw[at].tolist()}")


def check_grid(elements: int, grid_thw: Tensor, size: PatchSize) -> None:
    """Grids with `elements` elements in total."""
    if not readable(grid_thw):
        return
    check_merges(grid_thw, size.merge)
    total = int(grid_thw.prod(1).sum()) * size.row
    if total != elements:
        raise ValueError(f"grid_thw: expected grids with {elements} elements in total, got {total}")


def check_images(images: list[Tensor], grid_thw: Tensor, size: PatchSize) -> None:
    """One grid per image, matching its size."""
    elements = [image.numel() for image in images]
    check_grid(sum(elements), grid_thw, size)
    if readable(grid_thw) and (grid_thw.prod(1) * size.row).tolist() != elements:
        raise ValueError(f"grid_thw: expected {len(images)} grids, one matching each image, got {grid_thw.tolist()}")
