"""What a region's token holds: a row of floats, which the encoder, the mask and the objectives of regions share."""

from __future__ import annotations

__all__ = ["BOX", "CROP", "HIDDEN", "columns"]

BOX = slice(0, 5)
"""Left, top, right, bottom and area, as fractions of the image."""
HIDDEN = 5
"""1 where the encoder must not see the crop, else 0. The crop stays: it is what some objectives predict."""
CROP = slice(6, None)
"""The crop [3, side, side] in [-1, 1], flattened."""


def columns(side: int) -> int:
    """Of a token, for crops of `side` pixels a side."""
    return 6 + 3 * side**2
