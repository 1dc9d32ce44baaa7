"""Which held-out samples a run was evaluated on, as far as its settings tell."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path

from mmkernels.pretrain.config import Config
from mmkernels.pretrain.data.cells import MEDIA
from mmkernels.pretrain.data.opening import EMBEDDED, part_names
from mmkernels.pretrain.recipe import Recipe
from mmkernels.pretrain.setup import read_by

__all__ = ["held_out_of"]

_FILES = (*MEDIA, "regions", "pair")


def held_out_of(config: Config, data: str, recipe: Recipe | None, splits: Collection[str]) -> dict[str, str]:
    """Setting -> its value, of all that decides which samples are held out and measured. Those that a data set does not
    heed are left out: what is held out of one that comes along is fixed, and so are the splits of a data set that has
    some.

    Args:
        config: of the run.
        data: its name.
        recipe: of the run; None: it is not known.
        splits: that it was evaluated on.
    """
    found = {"data": data, "eval_limit": str(config.eval_limit), "validate": str(config.validate)}
    if config.validate and config.filter is not None:  # a tenth of what the list leaves
        found["filter"] = _digest(config.filter)
    by_hash = any(split == "held_out" or split.endswith(": held_out") for split in splits)
    if all(name in EMBEDDED for name in part_names(data)) or not (by_hash or config.validate or not splits):
        return found
    by = config.held_out_by or ([] if recipe is None else read_by(recipe)[0])
    return {
        **found,
        "eval_fraction": str(config.eval_fraction),
        "held_out_by": ", ".join(_ordered(by)) or config.recipe,
        "columns": f"{config.csv_img_key}, {config.csv_caption_key}",
    }


def _ordered(fields: Sequence[str]) -> list[str]:
    """Files first, the caption, other texts: in which order these come makes no difference."""
    return sorted(fields, key=lambda field: (field not in _FILES, field != "text"))


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:8] if file.is_file() else str(file)
