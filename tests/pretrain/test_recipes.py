"""Every recipe: it learns, gradients reach every parameter, chunks do not matter, a killed run resumes."""

from __future__ import annotations

import math
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmkernels.pretrain import Config, checkpoint, train
from mmkernels.pretrain.data import Data, Subset, open_data
from mmkernels.pretrain.recipes import load, names
from mmkernels.pretrain.schedule import weights_at
from mmkernels.pretrain.setup import texts
from mmkernels.pretrain.tokenizer import TextTokenizer
from mmkernels.pretrain.trainer import Trainer
from mmkernels.pretrain.wiring import leaves

STEPS = 12
SMALLER: dict[str, dict[str, Any]] = {"cca": {"model.embed_dim": 4}}  # which a small batch must exceed


def small(name: str, run: Path, **changes: Any) -> Config:
    """A recipe with narrow, shallow parts and a small batch."""
    known = leaves(load(name))
    parts: dict[str, Any] = {"model.width": 32, "model.heads": 2, "model.embed_dim": 32}
    parts |= {leaf: 1 for leaf, value in known.items() if leaf.endswith(".layers") and value > 1}
    parts |= {leaf: 16 for leaf in known if leaf.endswith(".queue") and known[leaf]}
    parts |= {leaf: 4 for leaf in known if leaf.endswith(".most_tokens")}
    parts |= SMALLER.get(name, {})
    options: dict[str, Any] = {"steps": STEPS, "batch": 8, "chunk": 3, "warmup": 2, "lr": 3e-3, "vocabulary": 400}
    options |= {"eval_every": 0, "eval_limit": 12, "checkpoint_every": 5, "tensorboard": False, "threads": 1}
    if load(name).settings.get("tokens"):
        options["tokens"] = 1200
    return Config.of(name, **{**options, "run": run, "parts": parts, **changes})


def few(name: str, **options: Any) -> Data:
    """A data set with at most 600 training samples, evenly spaced: tokenizers, lengths and probes read all of them."""
    found = open_data(name, **options)
    rows = np.unique(np.linspace(0, len(found.train) - 1, 600).astype(np.int64))
    return Data(Subset(found.train, rows), found.held_out)


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmkernels.pretrain.setup.open_data", few)


@cache
def opened(data: str, fields: tuple[str, ...]) -> tuple[Data, TextTokenizer]:
    """A data set, and a small tokenizer of its texts."""
    found = few(data)
    return found, TextTokenizer.train(texts(found.train, list(fields)), 400)


def trainer_of(config: Config) -> Trainer:
    recipe = config.wiring()
    fields = tuple(s.field or name for name, s in recipe.streams.items() if s.encoder.reads_text)
    data, tokenizer = opened(recipe.data, fields)
    return Trainer(config, data, tokenizer, torch.device("cpu"))


@pytest.mark.parametrize("name", names())
def test_trains_and_resumes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole run, and one that continues from a checkpoint of it, end alike, bit for bit."""
    outcome = train(small(name, tmp_path / "whole"))
    steps = outcome.folder.records("step")
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    assert all(record["loss"] == record["loss"] and abs(record["loss"]) < 1e4 for record in steps)
    figures = [figure for record in outcome.folder.records("eval") for figure in record["figures"]]
    assert figures, "it is measured"
    assert "could not be made" not in outcome.folder.report.read_text(encoding="utf-8"), "each section of the report"
    recipe = load(name)
    for record in steps if len(recipe.objectives) > 1 else ():
        told = {each for each in recipe.objectives if f"{each}/loss" in record}  # a batch may have nothing masked
        used = {each: weight for each, weight in weights_at(recipe, 0, record["step"] - 1).items() if each in told}
        own = [record.get(f"{each}/chance") for each in used]
        assert record.get("chance") == (None if None in own else pytest.approx(np.dot(list(used.values()), own)))

    (tmp_path / "killed").mkdir()
    for part in ("config.json", "tokenizer.json", "classes.json", "log.jsonl", "checkpoints/step-00000010"):
        source, target = tmp_path / "whole" / part, tmp_path / "killed" / part
        target.parent.mkdir(exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    monkeypatch.setattr("mmkernels.pretrain.loop.write_report", lambda folder, trainer: folder.report)  # drawn above
    train(small(name, tmp_path / "killed", resume=True))
    (weights, training), (others, other) = (
        checkpoint.load(tmp_path / run / "checkpoints" / f"step-{STEPS:08d}") for run in ("whole", "killed")
    )
    assert weights.keys() == others.keys()
    assert all(torch.equal(weight, others[key]) for key, weight in weights.items())
    assert training["loader"] == other["loader"]


@pytest.mark.parametrize("name", names())
def test_predictions_know_their_samples(name: str, tmp_path: Path) -> None:
    """Each sample owns as many of a batch's predictions as it has alone."""
    trainer = trainer_of(small(name, tmp_path))
    held_out = next(iter(trainer.held_out.values()))
    trainer.begin()
    for key, objective in trainer.model.objectives.items():
        if not hasattr(objective, "owners"):
            continue
        whole = next(held_out.batches("loss", items=range(5), objective=key))
        with torch.no_grad():
            chunk = trainer.model.whole(whole, key)
            found = objective.painted(chunk) if hasattr(objective, "painted") else outputs(objective, chunk)
            owners = objective.owners(chunk)
            assert len(owners) == len(found[1])
            assert len(owners)
            if hasattr(objective, "part") and getattr(objective.part, "negatives", "") == "sampled":  # alone: none
                assert owners.bincount(minlength=5).tolist() == [3] * 5
                continue
            for item, alone in enumerate(whole.split(1)):
                part = trainer.model.whole(alone, key)
                targets = objective.painted(part)[1] if hasattr(objective, "painted") else outputs(objective, part)[1]
                assert torch.equal(targets, found[1][owners == item])


def outputs(objective: Any, chunk: Any) -> tuple[torch.Tensor, torch.Tensor]:
    found: tuple[torch.Tensor, torch.Tensor] = (getattr(objective, "logits", None) or objective.vectors)(chunk)
    return found


@pytest.mark.parametrize("name", names())
def test_learns(name: str, tmp_path: Path) -> None:
    """On one batch, the loss falls, and every parameter gets a finite gradient that is not always zero."""
    trainer = trainer_of(small(name, tmp_path, lr=1e-2, steps=10_000))
    reached = {key: 0.0 for key, p in trainer.model.named_parameters()}
    batches: dict[frozenset[str], Any] = {}
    losses: dict[frozenset[str], list[float]] = {}
    drawn = trainer.recipe.draw
    for _ in range(16 * (len(trainer.model.objectives) if drawn else 1)):
        trainer.begin()
        used = trainer.weights.in_use(trainer.step) if drawn else frozenset()
        if drawn or not batches:
            batches.setdefault(used, next(trainer.loader))  # what it holds depends on the step's objectives
        found = trainer.backward(batches[used])
        assert math.isfinite(found.norm)
        losses.setdefault(used, []).append(found.loss)
        for key, p in trainer.model.named_parameters():
            if p.grad is not None:
                reached[key] = max(reached[key], p.grad.abs().max().item())
        trainer.update()
    idle = [key for key, most in reached.items() if most == 0 and not is_frozen(trainer, key)]
    assert not idle, f"no gradient: {idle}"
    for used, values in losses.items():
        if len(values) >= 8:
            assert min(values[-4:]) < values[0], f"{set(used)}: {values}"


def is_frozen(trainer: Trainer, name: str) -> bool:
    return not dict(trainer.model.named_parameters())[name].requires_grad


@pytest.mark.parametrize("name", names())
def test_norms_are_named(name: str, tmp_path: Path) -> None:
    """So that patterns of parameter names find them: with adapters, norms learn, too."""
    kinds = (torch.nn.LayerNorm, torch.nn.RMSNorm, torch.nn.GroupNorm)
    modules = trainer_of(small(name, tmp_path)).model.named_modules()
    found = [key for key, module in modules if isinstance(module, kinds)]
    assert found
    assert not [key for key in found if "norm" not in key]


@pytest.mark.parametrize("name", names())
def test_chunks_do_not_change_the_gradient(name: str, tmp_path: Path) -> None:
    """Of the second step, when twins and queues are in use."""

    def gradients(chunk: int) -> tuple[float, dict[str, torch.Tensor]]:
        trainer = trainer_of(small(name, tmp_path, chunk=chunk))
        for _ in range(2):
            trainer.begin()
            loss = trainer.backward(next(trainer.loader)).loss
            found = {key: p.grad.clone() for key, p in trainer.model.named_parameters() if p.grad is not None}
            trainer.optimizer.zero_grad(set_to_none=True)
            for objective in trainer.model.objectives.values():
                objective.after_step()
            trainer.step += 1
        return loss, found

    loss, whole = gradients(64)
    largest = max(gradient.abs().max().item() for gradient in whole.values())
    for chunk in (1, 3):
        other, got = gradients(chunk)
        assert other == pytest.approx(loss, rel=1e-5)
        for key, gradient in whole.items():
            error = (got[key] - gradient).abs().max().item()
            assert error <= 1e-5 * largest, f"{key}: {error / largest:.1e}"
