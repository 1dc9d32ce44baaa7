"""A count of what this process has received from other ranks."""

from __future__ import annotations

__all__ = ["count", "received_bytes"]

_total = 0


def received_bytes() -> int:
    """Bytes that `infonce` and `siglip` of this process have received from other ranks so far; a sum over W ranks of b
    bytes counts as 2(W-1)/W b. `mmkernels scale` predicts them."""
    return _total


def count(size: int) -> None:
    """Add bytes that arrive."""
    global _total
    _total += size
