"""Flop of steps: those of the counter, without what gradient caching repeats; over ranks; once for each kind."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from pretrain.started import SMALL, started
from torch.utils.flop_counter import FlopCounterMode

from mmkernels.pretrain import Config, flops, train
from mmkernels.pretrain.flops import Flops
from mmkernels.pretrain.ranks import ALONE
from mmkernels.pretrain.run_folder import RunFolder, stored_records
from mmkernels.pretrain.setup import open_source, tokenizer_for
from mmkernels.pretrain.trainer import Trainer


def counted(rank: int, world: int, run: str, recipe: str, steps: int, more: dict[str, Any]) -> dict[str, Any]:
    """(per kind: flop for each unit of work; of each step: its flop, and those that a counter around it sees)"""
    config = Config.of(recipe, run=Path(run), **{"steps": 50, "batch": 12, "chunk": 12, **more}, parts=SMALL)
    with started(config) as trainer:
        found = []
        for _ in range(steps):
            trainer.begin()
            batch = next(trainer.loader)
            with FlopCounterMode(display=False) as counter:
                trainer.backward(batch)
            seen = float(trainer.ranks.table([counter.get_total_flops()]).sum())
            found.append((trainer.flops.figures(1.0)["flops"] * world, seen))
            trainer.update()
        return {"per work": trainer.flops.state_dict(), "steps": found}


def test_as_counted(tmp_path: Path) -> None:
    (one,) = ranks.run(1, counted, str(tmp_path / "0"), "clip", 6, {})
    first, seen = one["steps"][0]
    assert first == pytest.approx(seen, rel=1e-9), "the one that is counted"
    for mine, seen in one["steps"][1:]:  # others have texts of other lengths
        assert mine == pytest.approx(seen, rel=0.05)
    assert list(one["per work"]) == ["stage 0, contrast"]


def test_what_is_embedded_twice_counts_once(tmp_path: Path) -> None:
    for recipe in ("clip", "albef"):  # one with a fusion and a momentum twin
        (whole,) = ranks.run(1, counted, str(tmp_path / f"{recipe}0"), recipe, 1, {})
        (cached,) = ranks.run(1, counted, str(tmp_path / f"{recipe}1"), recipe, 1, {"chunk": 4})
        (mine, _), (cached_once, cached_twice) = whole["steps"][0], cached["steps"][0]
        if recipe == "clip":
            assert cached_once == pytest.approx(mine, rel=1e-3)
            assert cached_twice > 1.25 * mine
        else:  # its fused features are computed twice, chunk by chunk
            assert mine < cached_once < cached_twice


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_over_ranks(parallel: str, tmp_path: Path) -> None:
    """Those of all ranks are those of one."""
    (one,) = ranks.run(1, counted, str(tmp_path / "1"), "clip", 2, {"chunk": 4})
    for each in ranks.run(2, counted, str(tmp_path / "2"), "clip", 2, {"chunk": 4, "parallel": parallel}):
        for (mine, _), (theirs, _) in zip(each["steps"], one["steps"], strict=True):
            assert mine == pytest.approx(theirs, rel=0.01)


def test_a_kind_each(tmp_path: Path) -> None:
    """A task that is drawn needs flop of its own."""
    (one,) = ranks.run(1, counted, str(tmp_path / "1"), "uniter", 12, {})
    assert len(one["per work"]) > 1
    for mine, seen in one["steps"]:
        assert mine == pytest.approx(seen, rel=0.05)


def test_in_the_log_and_after_resuming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    changes: dict[str, Any] = {"batch": 8, "chunk": 4, "eval_every": 0, "tensorboard": False, "eval_limit": 8}
    train(Config.of("clip", run=run, steps=4, checkpoint_every=2, parts=SMALL, **changes))
    shutil.rmtree(run / "checkpoints/step-00000004")
    monkeypatch.setattr(flops, "_Counter", None)  # it is not counted again
    train(Config.of("clip", run=run, steps=4, checkpoint_every=2, resume=True, parts=SMALL, **changes))
    for record in stored_records(run, "step"):
        assert record["flops"] > 0 and "mfu" not in record


def test_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The share of the data sheet's peak; nothing of compiled code."""
    monkeypatch.setattr(flops.Machine, "peak", staticmethod(lambda device, dtype: 1e6))
    found = Flops(torch.device("cpu"), torch.float32, ALONE)
    with found.step("a", 2.0):
        torch.ones(10, 10) @ torch.ones(10, 10)
    assert found.figures(0.5) == {"flops": 4000.0, "mfu": 0.004}
    with found.step("a", 4.0):
        pass
    assert found.figures(0.5)["flops"] == 8000.0
    compiled = Flops(torch.device("cpu"), torch.float32, ALONE, countable=False)
    with compiled.step("a", 2.0):
        pass
    assert compiled.figures(1.0) == {}


def test_frozen_encoders_run_once(tmp_path: Path) -> None:
    """Counting does not hide from gradient caching that nothing in them learns."""
    parts = SMALL | {"stages.stage.trainable": ("streams.text.*", "objectives.*")}
    config = Config.of("clip", run=tmp_path / "run", steps=5, batch=12, chunk=4, parts=parts)
    data = open_source(config)
    trainer = Trainer(config, data, tokenizer_for(config, data, RunFolder(config)), torch.device("cpu"))
    runs = {"image": 0, "text": 0}
    for name in runs:
        encoder = trainer.model.encoder(name)
        encoder.register_forward_hook(lambda *_, name=name: runs.update({name: runs[name] + 1}))
    for _ in range(2):
        trainer.begin()
        trainer.backward(next(trainer.loader))
        trainer.update()
    assert runs == {"image": 2 * 3, "text": 2 * 2 * 3}
