"""Weighted and Late: streams that meet as vectors or as decisions, against a loop over samples; in place of Cross."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pretrain.packed import facts, sample, shaken, tokens
from torch import Tensor

from mmkernels.pretrain import Config
from mmkernels.pretrain.data.scenes import open_scenes
from mmkernels.pretrain.encoders import Regions, Words
from mmkernels.pretrain.fusion import Late, Weighted
from mmkernels.pretrain.objectives import Answer
from mmkernels.pretrain.recipe import Stream
from mmkernels.pretrain.tokenizer import TextTokenizer
from mmkernels.pretrain.trainer import Trainer

NAMES = ("image", "question")
STREAMS = {"image": Stream(Regions()), "question": Stream(Words(layers=0))}
LENGTHS = {"image": (3, 0, 4, 0), "question": (2, 3, 1, 0)}
POOLS: dict[str, Any] = {"mean": lambda x: x.mean(0), "max": lambda x: x.amax(0), "first": lambda x: x[0]}


def found() -> dict[str, Any]:
    return {name: tokens(lengths, seed) for seed, (name, lengths) in enumerate(LENGTHS.items())}


def picks(paired: bool) -> tuple[dict[str, list[int]], Any]:
    chosen = (
        {"image": [0, 2, 1, 0, 3], "question": [1, 1, 3, 0, 0]} if paired else {name: [0, 1, 2, 3] for name in NAMES}
    )
    return chosen, {name: torch.tensor(rows) for name, rows in chosen.items()} if paired else None


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("keep", ["pooled", "tokens"])
def test_weighted(pool: Any, paired: bool, keep: Any) -> None:
    fusion = shaken(Weighted(NAMES, keep=keep, pool=pool).build(facts(STREAMS)))
    given = found()
    chosen, pairing = picks(paired)
    (got,) = fusion(given, pairing).values()
    expected: list[Tensor] = []
    for pair in zip(*(chosen[name] for name in NAMES), strict=True):
        rows = {name: sample(given[name], i) for name, i in zip(NAMES, pair, strict=True)}
        x = {name: fusion.norms[name](POOLS[pool](each)) for name, each in rows.items() if len(each)}
        if keep == "tokens" and not len(rows["question"]):
            continue
        if x:
            gates = torch.cat([fusion.gates[name](each) for name, each in x.items()]).softmax(0)
            mixed = sum(gate * fusion.values[name](each) for gate, (name, each) in zip(gates, x.items(), strict=True))
            expected.append(rows["question"] + mixed if keep == "tokens" else mixed[None])
    torch.testing.assert_close(got.x, torch.cat(expected))
    leaves = [*(each.x for each in given.values()), *fusion.parameters()]
    ours = torch.autograd.grad(got.x.square().sum(), leaves)
    theirs = torch.autograd.grad(torch.cat(expected).square().sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("paired", [False, True])
def test_late(pool: Any, paired: bool) -> None:
    fusion = shaken(Late(NAMES, into="both", pool=pool).build(facts(STREAMS)))
    given = found()
    chosen, pairing = picks(paired)
    got = fusion(given, pairing)["both"]
    expected, counts = [], []
    for pair in zip(*(chosen[name] for name in NAMES), strict=True):
        rows = {name: sample(given[name], i) for name, i in zip(NAMES, pair, strict=True)}
        pooled = {name: POOLS[pool](each) for name, each in rows.items() if len(each)}
        expected += [fusion.out[name](x + fusion.own[name](x)) for name, x in pooled.items()]
        counts.append(len(pooled))
    torch.testing.assert_close(got.x, torch.stack(expected))
    assert got.cu_seqlens.diff().tolist() == counts


@pytest.mark.parametrize("level", ["features", "logits"])
@pytest.mark.parametrize("pool", ["mean", "max", "first", "sum", "weighted"])
def test_how_an_answer_is_read(level: Any, pool: Any) -> None:
    part = Answer("both", label="tag", pool=pool, level=level)
    loss = shaken(part.build(facts(STREAMS)))
    given = tokens((2, 0, 3))
    labels = torch.tensor([4, 1, -100])
    chunk: Any = SimpleNamespace(batch=SimpleNamespace(labels={"tag": labels}), fused={"both": given})
    logits, targets = loss.logits(chunk)
    assert targets.tolist() == [4]
    x = sample(given, 0)
    weights = loss.score(x).sigmoid() if pool == "weighted" else None
    ways = {**POOLS, "sum": lambda x: x.sum(0), "weighted": lambda x: (weights / weights.sum() * x).sum(0)}  # type: ignore[operator]
    expected = ways[pool](loss.head(x)) if level == "logits" else loss.head(ways[pool](x))
    torch.testing.assert_close(logits[0], expected)


@pytest.mark.parametrize(
    ("fusion", "answer"),
    [
        ("Weighted()", ""),
        ('Weighted(keep="tokens")', 'pool="weighted"'),
        ("Late()", 'level="logits"'),
        ('Late(into="both")', 'level="logits", pool="sum", read="both"'),
    ],
)
def test_in_place_of_cross(fusion: str, answer: str, tmp_path: Path) -> None:
    """A whole recipe learns with them, and the size of chunks does not matter."""
    recipe = tmp_path / "mine.py"
    recipe.write_text(
        f"""
from dataclasses import replace
from mmkernels.pretrain.encoders import Patches, Words
from mmkernels.pretrain.fusion import Late, Weighted
from mmkernels.pretrain.recipe import Shape, Stream
from mmkernels.pretrain.recipes.vqa import RECIPE

RECIPE = replace(
    RECIPE,
    streams={{"image": Stream(Patches(size=16, layers=0)), "question": Stream(Words(layers=0))}},
    fusion={fusion},
    objectives={{"answer": replace(RECIPE.objectives["answer"], {answer})}},
    model=Shape(width=16, heads=2),
)
""",
        encoding="utf-8",
    )
    data = open_scenes(fields=("image", "question", "answer"), size=16, held_out_size=1)
    tokenizer = TextTokenizer.train([], 300)
    losses = []
    for chunk in (16, 3):
        config = Config.of(str(recipe), steps=9, batch=16, warmup=1, lr=0.02, chunk=chunk, threads=1, run=tmp_path)
        trainer = Trainer(config, data, tokenizer, torch.device("cpu"))
        losses.append(list[float]())
        for batch in islice(trainer.loader, 4):
            trainer.begin()
            losses[-1].append(trainer.backward(batch).loss)
            trainer.update()
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_wrong_wiring() -> None:
    for part in (Weighted(("image", "sound")), Weighted(("image",)), Weighted(("image", "image")), Late(("sound",))):
        with pytest.raises(ValueError, match=r"fusion.streams: expected .* of image, question, got"):
            part.build(facts(STREAMS))
    with pytest.raises(
        ValueError, match=r"fusion\.into: expected one of the streams, whose tokens are kept, got 'both'"
    ):
        Weighted(into="both", keep="tokens").build(facts(STREAMS))
