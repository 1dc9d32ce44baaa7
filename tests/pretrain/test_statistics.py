"""BatchNorm over several ranks: a warning, and the statistics of rank 0 everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from pretrain.normed import write_normed
from torch import nn

from mmkernels.pretrain import Config, train
from mmkernels.pretrain.launch import launched
from mmkernels.pretrain.ranks import Ranks
from mmkernels.pretrain.run_folder import stored_records
from mmkernels.pretrain.setup import open_source
from mmkernels.pretrain.statistics import Statistics
from mmkernels.pretrain.tokenizer import TextTokenizer
from mmkernels.pretrain.trainer import Trainer


def statistics_after(rank: int, world: int, recipe: str, parallel: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Statistics of model, twins and average after two steps, and before the second would have shared them."""
    torch.set_num_threads(1)
    config = Config.of(recipe, run=Path(recipe).parent / "run", parallel=parallel, ema=0.9, warmup=0)
    with launched(config) as (peers, device):
        trainer = Trainer(config, open_source(config), TextTokenizer.train([], 400), device, peers)
        found, said = [], []
        for _ in range(2):
            trainer.begin()
            trainer.backward(next(trainer.loader))
            found.append(statistics_of(trainer))
            trainer.update()
            said.append(trainer.statistics.warning())
        return [*found, statistics_of(trainer)], said


def statistics_of(trainer: Trainer) -> dict[str, Any]:
    return {name: value.tolist() for name, value in trainer.carried.state_dict().items() if ".module.2.running" in name}


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_all_ranks_have_the_statistics_of_rank_0(parallel: str, tmp_path: Path) -> None:
    (zero, said), (one, _) = ranks.run(2, statistics_after, write_normed(tmp_path), parallel)
    (name,) = (name for name in zero[0] if name.endswith("running_mean") and name.startswith("model."))
    assert zero[1][name] != one[1][name], "each has seen its own samples"
    assert zero[2] == one[2] and zero[2][name] == zero[1][name]
    assert len(zero[2]) == 6
    for each, values in zero[2].items():
        assert values == zero[2][name.replace("running_mean", each.rpartition(".")[2])], "followers copy them"
    assert said[0].startswith("BatchNorm (streams.image.encoder.module.2) normalises by the samples of each rank alone")
    assert said[1] == "", "once"


def test_of_one_rank_nothing_is_said(tmp_path: Path) -> None:
    config = Config.of(
        write_normed(tmp_path), run=tmp_path / "run", eval_every=0, tensorboard=False, steps=2, threads=1
    )
    train(config)
    assert not [r for r in stored_records(tmp_path / "run", "warning") if "BatchNorm" in r["message"]]


def test_layers_that_rest_or_are_synchronised_are_no_fault() -> None:
    several = Ranks()
    several.group = object()
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.SyncBatchNorm(2))
    model[0].eval()
    assert "(1)" in Statistics(model, ranks=several).warning()
    model[1].eval()
    assert Statistics(model, ranks=several).warning() == ""
