"""Which held-out samples a run was evaluated on, as its settings and its log tell."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmkernels.pretrain.config import Config
from mmkernels.pretrain.data.cells import MEDIA
from mmkernels.pretrain.data.opening import EMBEDDED, part_names
from mmkernels.pretrain.recipe import Recipe
from mmkernels.pretrain.setup import read_by

__all__ = ["agree", "digest", "held_out_of", "may_change"]

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
        found["filter"] = digest(config.filter)
    by_hash = any(split == "held_out" or split.endswith(": held_out") for split in splits)
    if not may_change(data) or not (by_hash or config.validate or not splits):
        return found
    by = config.held_out_by or ([] if recipe is None else read_by(recipe)[0])
    return {
        **found,
        "eval_fraction": str(config.eval_fraction),
        "held_out_by": ", ".join(_ordered(by)) or config.recipe,
        "columns": f"{config.csv_img_key}, {config.csv_caption_key}",
    }


def may_change(data: str) -> bool:
    """Whether some of the data do not come along."""
    return not all(name in EMBEDDED for name in part_names(data))


def _ordered(fields: Sequence[str]) -> list[str]:
    """Files first, the caption, other texts: in which order these come makes no difference."""
    return sorted(fields, key=lambda field: (field not in _FILES, field != "text"))


def digest(file: Path) -> str:
    """Of its content; its path, if it is no longer there."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:8] if file.is_file() else str(file)


def agree(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two runs have the same samples in each split that both have, as far as they have read the same of them.

    Args:
        one, other: split -> its number of samples, and a digest of each field, as in a record of a start.
    """
    splits = [(one[split], other[split]) for split in one.keys() & other.keys()]
    return all(
        a["samples"] == b["samples"]
        and all(b["fields"].get(field, held) == held for field, held in a["fields"].items())
        for a, b in splits
    )
