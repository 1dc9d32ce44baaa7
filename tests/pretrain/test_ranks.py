"""A run over several ranks is the run of one: the same losses and weights, whatever the recipe and the placement."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from pretrain.runs import TINY
from pretrain.started import SMALL, started

from mmkernels.pretrain import Config, checkpoint, train, warm_start
from mmkernels.pretrain.launch import launched
from mmkernels.pretrain.load import stored_weights
from mmkernels.pretrain.recipes import names
from mmkernels.pretrain.run_folder import RunFolder
from mmkernels.pretrain.setup import open_source, tokenizer_for
from mmkernels.pretrain.tokenizer import TextTokenizer
from mmkernels.pretrain.trainer import Outcome, Trainer

CLOSE = 3e-6  # of losses: float32, summed in another order


def steps(
    rank: int, world: int, recipe: str, count: int, changes: dict[str, Any], kept: Path | None = None
) -> dict[str, Any]:
    """What some steps come to, and the weights after them; with `kept`, going on from the newest checkpoint there, and
    leaving one."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"steps": 50, "chunk": 4, "warmup": 0, **changes, "parts": SMALL | changes.get("parts", {})}
        config = Config.of(recipe, run=Path(folder) / "run", **settings)
        data = open_source(config)
        with launched(config) as (peers, device):
            tokenizer = peers.of_leader(lambda: tokenizer_for(config, data, RunFolder(config)))
            trainer = Trainer(config, data, tokenizer, device, peers)
            if kept is not None:
                checkpoint.newest_whole(kept, trainer.load, group=trainer.saver.group)
            found, samples = [], []
            for _ in range(count):
                trainer.begin()
                batch = next(trainer.loader)
                samples.append([name for name in batch.names if name])
                found.append(trainer.backward(batch))
                trainer.update()
            if kept is not None:
                trainer.save(kept, wait=True)
            weights = {name: whole(value) for name, value in trainer.carried.state_dict().items()}
    return {"steps": found, "samples": samples, "weights": weights, "broken": dict(data.train.broken.reasons)}


def whole(value: Any) -> torch.Tensor:
    gathered: torch.Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return gathered.detach().clone()


def assert_same_run(recipe: str, world: int, count: int, **changes: Any) -> list[list[Outcome]]:
    """The steps of one process, and of each rank."""
    (one,) = ranks.run(1, steps, recipe, count, changes | {"parallel": "ddp"}, timeout=600)
    every = ranks.run(world, steps, recipe, count, changes, timeout=600)
    for each in every:
        for step, (mine, theirs) in enumerate(zip(each["steps"], one["steps"], strict=True)):
            where = f"{recipe}, step {step}"
            assert mine.loss == pytest.approx(theirs.loss, rel=CLOSE, abs=CLOSE), where
            assert mine.parts == pytest.approx(theirs.parts, rel=CLOSE, abs=CLOSE), where
            assert mine.chances.keys() == theirs.chances.keys(), where
            for name, chance in theirs.chances.items():  # None: there is no such thing
                expected = chance if chance is None else pytest.approx(chance, rel=CLOSE, abs=CLOSE)
                assert mine.chances[name] == expected, where
            assert mine.norm == pytest.approx(theirs.norm, rel=30 * CLOSE), where
        for name, value in each["weights"].items():
            assert torch.equal(value, every[0]["weights"][name]), f"{recipe}: ranks differ in {name}"
    for name, value in one["weights"].items():
        # Adam divides by the root of the second moment: where a gradient is all rounding, so is the step.
        different = (value - every[0]["weights"][name]).abs() > 30 * CLOSE
        assert different.sum() <= 1e-3 * value.numel() + 2, f"{recipe}: {name}"
    for step, samples in enumerate(one["samples"]):
        dealt = [name for each in every for name in each["samples"][step]]
        assert sorted(dealt) == sorted(samples), f"{recipe}, step {step}: each sample once"
    return [one["steps"], *(each["steps"] for each in every)]


@pytest.mark.parametrize("recipe", names())
def test_every_recipe_over_two_ranks(recipe: str) -> None:
    batch = 36 if recipe == "cca" else 8  # it needs more samples than an embedding has numbers
    parallel = ("ddp", "fsdp")[names().index(recipe) % 2]
    assert_same_run(recipe, 2, 2, batch=batch, chunk=3, parallel=parallel)


@pytest.mark.parametrize("recipe", ["clip", "siglip", "albef", "uniter", "moco", "caption"])
@pytest.mark.parametrize("parallel", ["ddp", "hsdp"])
def test_four_ranks(recipe: str, parallel: str) -> None:
    """Enough steps for queues and momentum twins to matter; chunks differ in number between ranks."""
    assert_same_run(recipe, 4, 3, batch=10, chunk=2, parallel=parallel, shard_ranks=2)


def test_more_ranks_than_samples_to_deal() -> None:
    """Some rank has nothing in a batch of tokens, and takes part all the same."""
    assert_same_run("gpt", 4, 2, batch=4, tokens=400, chunk=2, parallel="fsdp")


@pytest.mark.parametrize(("world", "parallel"), [(2, "ddp"), (2, "fsdp"), (4, "hsdp")])
def test_frozen_parts_and_stages(world: int, parallel: str) -> None:
    """Encoders that do not learn are not reduced; a stage changes what does."""
    parts = {"stages.stage_0.until": 1, "stages.stage_1.until": 2}
    assert_same_run("progressive", world, 4, batch=8, chunk=3, parallel=parallel, shard_ranks=2, parts=parts)


@pytest.mark.parametrize(("recipe", "parallel"), [("albef", "ddp"), ("uniter", "ddp"), ("progressive", "fsdp")])
def test_measured_weights(recipe: str, parallel: str) -> None:
    """Norms and losses are those of all ranks, and so are the weights, or odds, that follow; also in a stage that
    freezes the encoders."""
    parts: dict[str, Any] = {"policy.kind": "grad_norm", "policy.every": 2}
    if recipe == "progressive":
        parts |= {"policy.every": 1, "stages.stage_0.until": 1, "stages.stage_1.until": 3}
    found = assert_same_run(recipe, 2, 5, batch=8, chunk=3, parallel=parallel, parts=parts)
    for steps in zip(*found, strict=True):
        assert all(step.shares == pytest.approx(steps[0].shares, rel=1e-4) for step in steps)
        assert steps[1].shares == steps[2].shares, "exactly the same on both ranks"
    assert found[0][-1].shares != found[0][0].shares


@pytest.mark.parametrize("recipe", ["clip", "progressive", "gpt", "albef"])
def test_low_precision_shards(recipe: str) -> None:
    """Gathered weights are bfloat16: losses agree to its rounding. With stages, rotary tables and a queue, too."""
    stages = {"stages.stage_0.until": 1, "stages.stage_1.until": 2} if recipe == "progressive" else {}
    changes = {"batch": 12, "precision": "bfloat16", "parts": stages}
    (one,) = ranks.run(1, steps, recipe, 3, changes)
    both = ranks.run(2, steps, recipe, 3, changes | {"parallel": "fsdp"})
    assert both[0]["steps"] == both[1]["steps"]
    for mine, theirs in zip(both[0]["steps"], one["steps"], strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=0.02)
        assert mine.norm == pytest.approx(theirs.norm, rel=0.1)
        assert math.isfinite(mine.norm)


def test_what_cannot_be_read_is_known_to_all(pictures: Path) -> None:
    for picture in sorted(pictures.rglob("*.png"))[::5]:
        picture.write_bytes(b"not a picture")
    changes = {"data": f"folder:{pictures}", "batch": 8, "max_broken": 0.5}
    (one,) = ranks.run(1, steps, "clip", 4, changes)
    both = ranks.run(2, steps, "clip", 4, changes)
    assert one["broken"] and both[0]["broken"] == both[1]["broken"] == one["broken"]
    for mine, theirs in zip(both[0]["steps"], one["steps"], strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=CLOSE)


@pytest.mark.parametrize("recipe", ["moco", "albef", "uniter"])
def test_resumed_on_other_ranks(recipe: str, tmp_path: Path) -> None:
    """Two ranks, then four in shards, then one: the samples, losses and weights of a run that never stopped."""
    changes: dict[str, Any] = {"batch": 8, "chunk": 3, "workers": 0}
    (one,) = ranks.run(1, steps, recipe, 6, changes)
    parts = [
        ranks.run(world, steps, recipe, 2, changes | {"parallel": parallel}, tmp_path, timeout=300)
        for world, parallel in ((2, "ddp"), (4, "fsdp"), (1, "ddp"))
    ]
    found = [step for every in parts for step in every[0]["steps"]]
    assert [step.loss for step in found] == pytest.approx([step.loss for step in one["steps"]], rel=10 * CLOSE)
    samples = [sorted(name for each in every for name in each["samples"][i]) for every in parts for i in range(2)]
    assert samples == [sorted(each) for each in one["samples"]]
    for name, value in one["weights"].items():
        different = (value - parts[-1][0]["weights"][name]).abs() > 100 * CLOSE
        assert different.sum() <= 2e-3 * value.numel() + 2, name


def keys_sent(rank: int, world: int, recipe: str) -> tuple[list[tuple[str, ...]], list[str]]:
    """(what was on its way before the loss, the streams in the order in which they were encoded)"""
    with tempfile.TemporaryDirectory() as folder:
        config = Config.of(recipe, run=Path(folder) / "run", steps=2, batch=12, chunk=2, parts=SMALL)
        with started(config) as trainer:
            trainer.begin()
            batch = next(trainer.loader)
            trainer.backward(batch)
            return sorted(batch.roster.sent), list(trainer.model.encoded)


def test_keys_are_sent_while_other_streams_are_encoded() -> None:
    for recipe in ("clip", "siglip"):
        for world in (1, 2):
            for sent, order in ranks.run(world, keys_sent, recipe):
                assert order[0] == "text" and sent == [("text", "image", "text")][: world - 1]
    for recipe in ("moco", "albef"):  # a queue's keys are the twin's; embeddings after tokens
        for sent, _ in ranks.run(2, keys_sent, recipe):
            assert not sent


def partners_of(rank: int, world: int, scope: str, batch: int) -> dict[str, Any]:
    """One step of matching: who was paired with whom, and what was received."""
    with tempfile.TemporaryDirectory() as folder:
        parts = SMALL | {"objectives.matching.scope": scope}
        config = Config.of("albef", run=Path(folder) / "run", steps=2, batch=batch, chunk=2, parts=parts)
        with started(config) as trainer:
            trainer.begin()
            batch_ = next(trainer.loader)
            before = trainer.ranks.received
            outcome = trainer.backward(batch_)
            wrong = trainer.model.objectives["matching"]._wrong
            pairs = {name: each.tolist() for name, each in wrong.items()}
        concepts = batch_.concepts.tolist()
    return {"pairs": pairs, "concepts": concepts, "received": trainer.ranks.received - before, "outcome": outcome}


def test_negatives_of_a_rank_alone() -> None:
    (one,), (same,) = (ranks.run(1, partners_of, scope, 12) for scope in ("batch", "rank"))
    assert one["pairs"] == same["pairs"] and one["outcome"] == same["outcome"]
    batch, own = (ranks.run(2, partners_of, scope, 12) for scope in ("batch", "rank"))
    for rank in range(2):
        concepts = own[rank]["concepts"]
        for wrong in own[rank]["pairs"].values():
            assert len(wrong) == len(concepts) and max(wrong) < len(concepts), "none of another rank's"
            assert all(n < 0 or concepts[n] != mine for n, mine in zip(wrong, concepts, strict=True))
            assert max(wrong) >= 0
        assert own[rank]["received"] < 0.5 * batch[rank]["received"], "no tokens are exchanged"
    assert math.isfinite(own[0]["outcome"].loss) and own[0]["outcome"] == own[1]["outcome"]
    for alone in ranks.run(4, partners_of, "rank", 4):  # a sample each: no negatives, and nobody waits
        assert all(n == -1 for wrong in alone["pairs"].values() for n in wrong)
        assert math.isfinite(alone["outcome"].loss)


def both_contrasts(rank: int, world: int, file: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        config = Config.of(file, run=Path(folder) / "run", steps=2, batch=12, chunk=2, parts=SMALL)
        with started(config) as trainer:
            trainer.begin()
            return trainer.backward(next(trainer.loader))


TWO = """
from mmkernels.pretrain.encoders import Patches, Words
from mmkernels.pretrain.objectives import Contrast, Sigmoid
from mmkernels.pretrain.recipe import Recipe, Stream
from mmkernels.pretrain.state import Ema

RECIPE = Recipe(
    "Two contrasts of the same streams, one of them with a queue",
    source="none",
    data="emoji",
    streams={"image": Stream(Patches(), teacher=Ema(0.9)), "text": Stream(Words(), teacher=Ema(0.9))},
    objectives={"pairs": Sigmoid("image", "text"), "queued": Contrast("image", "text", queue=64)},
)
"""


def test_what_one_objective_sends_is_not_anothers(tmp_path: Path) -> None:
    (tmp_path / "both.py").write_text(TWO, encoding="utf-8")
    (one,), two = (ranks.run(world, both_contrasts, str(tmp_path / "both.py")) for world in (1, 2))
    assert two[0].parts == pytest.approx(one.parts, rel=CLOSE)


def test_scope_is_checked() -> None:
    with pytest.raises(ValueError, match="scope: expected 'batch' or 'rank', got 'node'"):
        partners_of(0, 1, "node", 4)


def begun_with(rank: int, world: int, run: Path, parallel: str, data: str, fresh: tuple[str, ...]) -> Any:
    """(What a run begins with, how often this rank has read the other run); or an error."""
    torch.set_num_threads(1)
    read = []

    def counted(run: Path) -> Any:
        read.append(run)
        return stored_weights(run)

    changes: Any = {"parallel": parallel, "data": data, "batch": 8, "parts": TINY, "fresh": fresh}
    config = Config.of("clip", run=run.parent / "other", init=run, **changes)
    source = open_source(config)
    with launched(config) as (peers, device), pytest.MonkeyPatch.context() as patch:
        patch.setattr(warm_start, "stored_weights", counted)
        trainer = Trainer(config, source, TextTokenizer.load(run / "tokenizer.json"), device, peers)
        try:
            trainer.warm_start(run)
        except ValueError as error:
            return str(error), len(read)
        return {name: whole(value) for name, value in trainer.carried.state_dict().items()}, len(read)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_one_rank_reads_the_weights_that_all_begin_with(parallel: str, tiny: Callable[..., Config]) -> None:
    config = tiny(steps=2, eval_every=0)
    train(config)
    ((expected, _),) = ranks.run(1, begun_with, config.run, "ddp", config.data, ())
    both = ranks.run(2, begun_with, config.run, parallel, config.data, ())
    assert [reads for _, reads in both] == [1, 0]
    for weights, _ in both:
        assert weights.keys() == expected.keys()
        assert all(torch.equal(value, weights[name]) for name, value in expected.items())
    wrong = ranks.run(2, begun_with, config.run, parallel, config.data, ("no.such.*",))
    assert wrong[0][0] == wrong[1][0] != "" and "fresh: expected patterns" in wrong[0][0]
    for shard in (config.run / "checkpoints/step-00000002").glob("weights*"):
        shard.write_bytes(shard.read_bytes()[:-4])
    torn = ranks.run(2, begun_with, config.run, parallel, config.data, ())
    assert torn[0][0] == torn[1][0] and "is damaged" in torn[0][0]
