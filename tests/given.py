"""What the blocks of a page take for granted: names, and files in the working folder."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from blocks import blocks_of
from PIL import Image
from torch import nn

import mmkernels
from mmkernels import Media, Modality, PackedBatch
from mmkernels.pretrain import Config, recipes, train
from mmkernels.pretrain.run_folder import RunFolder

__all__ = ["names", "put_files"]

_TRAINED = ("caption", "clip", "mae")  # those whose weights a page uses
_RUN = re.compile(r"\bruns/(\w+)")
_MADE = re.compile(r"--recipe (\S+)[^\n]* --run runs/([\w-]+)")


def _trained(name: str, folder: Path) -> Path:
    """A run of one step, as small as it gets, which pages share."""
    run = folder / "runs" / name
    if not run.exists():
        small: dict[str, Any] = {"steps": 1, "batch": 4, "chunk": 4, "eval_limit": 2, "tensorboard": False}
        train(Config.of(name, **small, parts={"model.width": 32}, run=run))
    return run


def put_files(page: str, folder: Path, runs: Path | None = None) -> None:
    """Write the files that a page's blocks name: runs of recipes, and a recipe that its Python blocks are.

    Args:
        page: its path.
        folder: the working folder.
        runs: where trained runs are kept for other pages. None: settings alone, which are enough to read a command.
    """
    blocks = blocks_of(page)
    code = "\n".join(block.code for block in blocks)
    made = {name: name for name in _RUN.findall(code) if name in recipes.names()}
    made |= {name: recipe for recipe, name in _MADE.findall(code) if recipe in recipes.names()}
    for name, recipe in made.items():
        if runs is not None and name in _TRAINED:
            shutil.copytree(_trained(name, runs), folder / "runs" / name)
        else:
            config = Config.of(recipe, run=folder / "runs" / name)
            RunFolder(config).begin(config, "{}", {})
    if "./mine.py" in code:
        recipe = "\n".join(block.code for block in blocks if block.language == "python")
        (folder / "mine.py").write_text(recipe, encoding="utf-8")
    for name in re.findall(r"\bfolder:(\w+)", code):
        (folder / name).mkdir(exist_ok=True)


def names(page: str) -> Mapping[str, Any]:
    """Names that a page uses without defining them; it says what they are."""
    make = _NAMES.get(page)
    return {} if make is None else make()


def _a_batch(capacity: int = 64) -> PackedBatch:
    image = Media(Modality.IMAGE, torch.randn(4, 12), tokens=4)
    return PackedBatch.from_samples([[torch.arange(5), image], [torch.arange(7)]], capacity=capacity)


def _of_attention() -> Mapping[str, Any]:
    batch = _a_batch()
    q, k, v = torch.randn(3, batch.num_tokens, 2, 16).unbind()
    return {
        **vars(mmkernels), "torch": torch, "batch": batch, "span_ids": batch.span_ids, "q": q, "k": k, "v": v,
        "bias": torch.randn(2, 4, 4), "sink": torch.randn(2), "training": True,
    }  # fmt: skip


def _of_contrastive() -> Mapping[str, Any]:
    queries, keys = nn.functional.normalize(torch.randn(2, 32, 16), dim=-1).unbind()
    scale, bias = torch.tensor(14.3), torch.tensor(-10.0)
    return {
        **vars(mmkernels), "mmkernels": mmkernels, "queries": queries, "keys": keys, "logit_scale": scale,
        "logit_bias": bias, "ids": torch.arange(32), "queue": torch.randn(8, 16),
    }  # fmt: skip


def _of_batches() -> Mapping[str, Any]:
    data = [[torch.arange(n), Media(Modality.IMAGE, torch.randn(4, 12), tokens=4)] for n in (5, 9, 2)]
    encode, project = nn.Linear(12, 16), nn.Linear(16, 48)
    return {
        **vars(mmkernels), "data": data, "lengths": [len(text) + 4 for text, _ in data], "table": torch.randn(10, 16),
        "encoder": lambda values, cu_values: encode(values),
        "project": lambda x: project(x).unflatten(-1, (3, 2, 8)).unbind(1),
    }  # fmt: skip


def _of_planning() -> Mapping[str, Any]:
    return {"dataset": [{"tokens": torch.arange(n)} for n in (900, 3000, 120, 2048)], "train": lambda batch: None}


def _of_pretraining() -> Mapping[str, Any]:
    Image.new("RGB", (60, 40), "red").save("red.png")
    return {"paths": ["red.png"]}


def _of_transfer() -> Mapping[str, Any]:
    return {"image": Image.new("RGB", (60, 40), "red")}


_NAMES = {
    "docs/pretraining.md": _of_pretraining,
    "docs/transfer.md": _of_transfer,
    "mmkernels/batch/README.md": _of_batches,
    "mmkernels/ops/attention/README.md": _of_attention,
    "mmkernels/ops/contrastive/README.md": _of_contrastive,
    "mmkernels/planning/README.md": _of_planning,
}
