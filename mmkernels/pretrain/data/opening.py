"""`open_data`: any data source by its name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from mmkernels.pretrain.data.base import Data, DecodedDataset, Subset, caption_key
from mmkernels.pretrain.data.corpus import open_text
from mmkernels.pretrain.data.emoji import open_emoji
from mmkernels.pretrain.data.folder import FolderDataset
from mmkernels.pretrain.data.languages import open_languages
from mmkernels.pretrain.data.motion import open_motion
from mmkernels.pretrain.data.scenes import open_scenes
from mmkernels.pretrain.data.speech import open_speech
from mmkernels.pretrain.data.tables import TableFormat, find_table
from mmkernels.pretrain.data.webdataset import WebDataset

__all__ = ["EMBEDDED", "held_out_mask", "open_data"]

EMBEDDED: dict[str, Callable[[], Data]] = {
    "emoji": open_emoji,
    "languages": open_languages,
    "motion": open_motion,
    "scenes": open_scenes,
    "speech": open_speech,
    "text": open_text,
}
"""The data sets that come along."""


def open_data(
    source: str | Path = "emoji",
    *,
    table: TableFormat | None = None,
    resolution: int = 48,
    eval_fraction: float = 0.1,
    max_eval: int = 2000,
    max_broken: float = 0.05,
    cache_bytes: int = 1 << 30,
) -> Data:
    """Open training data and its held-out sets.

    Args:
        source: the name of an embedded data set; a folder with a table, or the table (.jsonl, .csv, .tsv, .parquet);
            tar shards (file, folder, glob).
        table: its separator and columns, if not the defaults.
        resolution: side in pixels at which your own images are kept.
        eval_fraction: fraction of your own concepts held out, chosen by a hash of the caption, so that adding data
            never moves a sample between the sets.
        max_eval: most samples in the held-out set, evenly spaced.
        max_broken: fraction of the samples that may be unreadable.
        cache_bytes: memory for decoded images.
    """
    embedded = EMBEDDED.get(str(source))
    shards = embedded is None and _is_shards(Path(source))
    if table not in (None, TableFormat()) and (shards or embedded is not None):
        raise ValueError(f"csv_separator, csv_img_key, csv_caption_key: expected a table to read, got {source}")
    if embedded is not None:
        return embedded()
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"eval_fraction: expected 0 <= eval_fraction < 1, got {eval_fraction}")
    open_it: Callable[..., DecodedDataset] = WebDataset if shards else partial(FolderDataset, table=table)
    dataset = open_it(source, resolution=resolution, max_broken=max_broken, cache_bytes=cache_bytes)
    held_out = held_out_mask(dataset, eval_fraction)
    train = Subset(dataset, np.flatnonzero(~held_out))
    if not len(train):
        raise ValueError(f"{source}: expected samples left to train on, got all {len(dataset)} held out")
    rows = np.flatnonzero(held_out)
    if len(rows) > max_eval:
        rows = rows[np.linspace(0, len(rows) - 1, max_eval).astype(np.int64)]
    return Data(train, {"held_out": Subset(dataset, rows)} if len(rows) else {})


def held_out_mask(dataset: DecodedDataset, fraction: float) -> np.ndarray:
    """bool [n]: whether the first caption of each sample hashes into the first `fraction` of the range."""
    keys = (caption_key(captions) for captions in dataset.captions)
    hashes = (int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") for key in keys)
    return np.array([h < fraction * 2**64 for h in hashes], bool)


def _is_shards(path: Path) -> bool:
    """Whether `path` is tar shards: by suffix, or a folder with shards and without a .jsonl or .csv. A .parquet does
    not count: downloaders put one next to each shard.
    """
    if not path.is_dir():
        return path.suffix.lower() == ".tar"
    if not any(path.glob("*.tar")):
        return False
    try:
        return find_table(path).suffix.lower() not in (".jsonl", ".csv")
    except ValueError:
        return True
