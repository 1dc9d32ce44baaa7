"""Training batches, and `open_data` for any data source."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmkernels.pretrain.data.augment import Augment
from mmkernels.pretrain.data.base import DecodedDataset, Source, Subset, TooManyBrokenError, caption_key
from mmkernels.pretrain.data.emoji import load_emoji
from mmkernels.pretrain.data.folder import FolderDataset
from mmkernels.pretrain.data.retrieval import RetrievalSet
from mmkernels.pretrain.data.sampler import BatchSampler
from mmkernels.pretrain.data.tables import TableFormat, find_table
from mmkernels.pretrain.data.text import TextBatch, Tokenizer
from mmkernels.pretrain.data.webdataset import WebDataset


class Data(NamedTuple):
    """Training data and evaluation sets of a run."""

    train: Source
    evals: dict[str, RetrievalSet]  # by split: A, B, C for the emoji, "held_out" for the user's own data


@dataclass(frozen=True)
class Batch:
    """One training batch of B samples of B different concepts (fewer than requested if some were broken)."""

    images: Tensor  # float32 [B, 3, S, S] in [-1, 1]
    text: TextBatch
    captions: list[str]
    concepts: Tensor  # int64 [B]
    names: list[str]
    step: int  # which batch of the run this is, from 0


class TrainLoader:
    """Endless `Batch`es; the n-th depends on the data, the seed and n alone.

    Args:
        dataset: the training data.
        batch_size: samples per batch; at most the number of distinct concepts.
        image_size: side of the training images in pixels.
        tokenizer: captions to ids.
        augment: ranges of the augmentation.
        seed: of the order and the augmentation.
    """

    def __init__(
        self,
        dataset: Source,
        *,
        batch_size: int,
        image_size: int = 32,
        tokenizer: Tokenizer | None = None,
        augment: Augment | None = None,
        seed: int = 0,
    ) -> None:
        if image_size < 1:
            raise ValueError(f"image_size: expected at least 1 pixel, got {image_size}")
        self.dataset, self.image_size, self.seed = dataset, image_size, seed
        self.tokenizer, self.augment = tokenizer or Tokenizer(), augment or Augment()
        self.sampler = BatchSampler(dataset.concepts, batch_size, seed)

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> Batch:
        step = self.sampler.step
        samples = self.dataset.read(next(self.sampler))
        if not samples:
            raise TooManyBrokenError(f"no sample of batch {step} could be read; {len(self.dataset.broken)} are broken")
        images = np.stack([sample.image for sample in samples])
        captions = self.augment.captions(samples, seed=self.seed, step=step)
        return Batch(
            self.augment.images(images, self.image_size, seed=self.seed, step=step),
            self.tokenizer(captions),
            captions,
            torch.tensor([sample.concept for sample in samples], dtype=torch.int64),
            [sample.name for sample in samples],
            step,
        )

    def state_dict(self) -> dict[str, Any]:
        """The cursor, JSON-serialisable. There is no other state."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last batch yielded before `state_dict` was taken."""
        self.sampler.load_state_dict(state)


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
        source: `"emoji"` (embedded); a folder with a table, or the table (.jsonl, .csv, .tsv, .parquet); tar shards
            (file, folder, glob).
        table: its separator and columns, if not the defaults.
        resolution: side in pixels at which your own images are kept.
        eval_fraction: fraction of your own concepts held out, chosen by a hash of the caption, so that adding data
            never moves a sample between the sets.
        max_eval: most images in the held-out set.
        max_broken: fraction of the samples that may be unreadable.
        cache_bytes: memory for decoded images.
    """
    shards = str(source) != "emoji" and _is_shards(Path(source))
    if table not in (None, TableFormat()) and (shards or str(source) == "emoji"):
        raise ValueError(f"csv_separator, csv_img_key, csv_caption_key: expected a table to read, got {source}")
    if str(source) == "emoji":
        return Data(load_emoji("train"), {"A": load_emoji("A"), "B": load_emoji("B"), "C": load_emoji("C")})
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"eval_fraction: expected 0 <= eval_fraction < 1, got {eval_fraction}")
    open_it: Callable[..., DecodedDataset] = WebDataset if shards else partial(FolderDataset, table=table)
    dataset = open_it(source, resolution=resolution, max_broken=max_broken, cache_bytes=cache_bytes)
    held_out = held_out_mask(dataset, eval_fraction)
    train = Subset(dataset, np.flatnonzero(~held_out))
    if not len(train):
        raise ValueError(f"{source}: expected samples left to train on, got all {len(dataset)} held out")
    if not held_out.any():
        return Data(train, {})
    evals = RetrievalSet.build("held-out captions", Subset(dataset, np.flatnonzero(held_out)), limit=max_eval)
    return Data(train, {"held_out": evals} if len(evals.targets) else {})


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
