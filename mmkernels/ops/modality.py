"""Modality ids, shared by the families, which do not import each other."""

from __future__ import annotations

from enum import IntEnum

import torch

__all__ = ["MAX_MODALITIES", "Modality"]

# One bit of an int32 per modality.
MAX_MODALITIES = 32


class Modality(IntEnum):
    """Ids for `modality_ids` (uint8). The other ids up to 31 are free for users."""

    TEXT = 0
    IMAGE = 1
    AUDIO = 2
    VIDEO = 3


torch.serialization.add_safe_globals([Modality])
