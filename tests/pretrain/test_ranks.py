"""A run over several ranks is the run of one: the same losses and weights, whatever the recipe and the placement."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from mmkernels.pretrain import Config
from mmkernels.pretrain.launch import launched
from mmkernels.pretrain.run_folder import RunFolder
from mmkernels.pretrain.setup import open_source, tokenizer_for
from mmkernels.pretrain.trainer import Trainer

SMALL = {"model.width": 32, "model.heads": 2, "model.embed_dim": 32}


def steps(rank: int, world: int, recipe: str, count: int, changes: dict[str, Any]) -> dict[str, Any]:
    """The losses of some steps, and the weights after them."""
    torch.set_num_threads(1)
    parts = SMALL | changes.pop("parts", {})
    with tempfile.TemporaryDirectory() as folder:
        config = Config.of(recipe, run=Path(folder) / "run", **{"steps": 50, "chunk": 4, **changes}, parts=parts)
        data = open_source(config)
        with launched(config) as (peers, device):
            tokenizer = peers.of_leader(lambda: tokenizer_for(config, data, RunFolder(config)))
            trainer = Trainer(config, data, tokenizer, device, peers)
            found: list[Any] = []
            for _ in range(count):
                trainer.begin()
                found.append(trainer.backward(next(trainer.loader)))
                trainer.update()
            weights = {name: whole(value) for name, value in trainer.carried.state_dict().items()}
    return {"steps": found, "weights": weights}


def whole(value: Any) -> torch.Tensor:
    gathered: torch.Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return gathered.detach().clone()


def agree(a: dict[str, Any], b: dict[str, Any], tolerance: float) -> None:
    for mine, theirs in zip(a["steps"], b["steps"], strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=tolerance, abs=tolerance)
        assert mine.norm == pytest.approx(theirs.norm, rel=50 * tolerance)
        assert mine.parts == pytest.approx(theirs.parts, rel=tolerance, abs=tolerance)
        assert mine.chances == pytest.approx(theirs.chances, rel=0.05)
    for name, value in a["weights"].items():
        assert float((value - b["weights"][name]).abs().max()) < 100 * tolerance, name
