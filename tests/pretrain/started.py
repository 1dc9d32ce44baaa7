"""A trainer at the first step of a run, on one rank or several."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mmkernels.pretrain import Config
from mmkernels.pretrain.launch import launched
from mmkernels.pretrain.run_folder import RunFolder
from mmkernels.pretrain.setup import open_source, tokenizer_for
from mmkernels.pretrain.trainer import Trainer

__all__ = ["SMALL", "started"]

SMALL = {"model.width": 32, "model.heads": 2, "model.embed_dim": 32}


@contextmanager
def started(config: Config) -> Iterator[Trainer]:
    """Of a process group that there is, or of this process alone."""
    data = open_source(config)
    with launched(config) as (peers, device):
        tokenizer = peers.of_leader(lambda: tokenizer_for(config, data, RunFolder(config)))
        yield Trainer(config, data, tokenizer, device, peers)
