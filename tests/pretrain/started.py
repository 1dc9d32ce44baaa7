"""A trainer at the first step of a run, on one rank or several."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mmkernels.pretrain import Config
from mmkernels.pretrain.launch import launched
from mmkernels.pretrain.run_folder import RunFolder
from mmkernels.pretrain.setup import open_source, tokenizer_for
from mmkernels.pretrain.trainer import Trainer

__all__ = ["SMALL", "assert_equal", "started", "weights_of"]

SMALL = {"model.width": 32, "model.heads": 2, "model.embed_dim": 32}


@contextmanager
def started(config: Config) -> Iterator[Trainer]:
    """Of a process group that there is, or of this process alone."""
    data = open_source(config)
    with launched(config) as (peers, device):
        tokenizer = peers.of_leader(lambda: tokenizer_for(config, data, RunFolder(config)))
        yield Trainer(config, data, tokenizer, device, peers)


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    """A copy of the model, its twins and its average."""
    return {name: value.clone() for name, value in trainer.carried.state_dict().items()}


def assert_equal(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """To the last bit."""
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name
