"""Which samples a held-out set has, in few letters: so a log tells whether another run was measured on the same."""

from __future__ import annotations

import hashlib
from typing import Any

from mmkernels.pretrain.metrics import HeldOut

__all__ = ["digests_of"]


def digests_of(held_out: HeldOut) -> dict[str, Any]:
    """How many samples of a set are in use, and a digest of each field of them, see `Source.contents`: of each apart,
    because another run may read other fields of the same samples. Where nothing can change but the name, it is that of
    the names.

    Args:
        held_out: the set.
    """
    source, items = held_out.source, held_out.items()
    fields: dict[str, Any] = {}
    for row, index in enumerate(items):
        for field, content in (source.contents(index) or {"name": source.name(index)}).items():
            if content:  # it has the field
                fields.setdefault(field, hashlib.sha256()).update(f"{row} {content}\n".encode("utf-8", "replace"))
    return {"samples": len(items), "fields": {field: each.hexdigest()[:8] for field, each in fields.items()}}
