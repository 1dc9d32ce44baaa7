"""Masked regions: tags, scores and pixels, against plain PyTorch; and what is skipped."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pretrain.packed import facts, shaken
from pretrain.test_encoders_regions import NONE, regions

from mmkernels import PackedBatch
from mmkernels.pretrain.batch import Batch
from mmkernels.pretrain.data.seeds import Draws
from mmkernels.pretrain.encoders import Regions, Words
from mmkernels.pretrain.metrics import Predictions
from mmkernels.pretrain.model import Model
from mmkernels.pretrain.objectives import MaskedRegions, Matching
from mmkernels.pretrain.recipe import Recipe, Stream
from mmkernels.pretrain.region_columns import CROP
from mmkernels.pretrain.views import MaskRegions, Swap

PART = Regions(side=4)
STREAMS = {"regions": Stream(PART, views=(MaskRegions(share=0.4),))}
COUNTS = (3, 0, 2, 5, 1)


def batch(counts: tuple[int, ...] = COUNTS, matched: list[int] | None = None) -> Batch:
    pieces = PART.prepare([regions(n, 4, seed) for seed, n in enumerate(counts)], NONE)
    pieces = MaskRegions(share=0.4)(pieces, Draws(0, 0, "x", np.arange(len(counts))), {})
    packed = PackedBatch.from_samples([p.tokens for p in pieces], labels=[p.labels for p in pieces])
    labels = {} if matched is None else {"matched": torch.tensor(matched)}
    n = len(counts)
    return Batch({"regions": packed}, labels, torch.arange(n), [str(i) for i in range(n)], list(range(n)), 0)


def model(**options: Any) -> Any:
    recipe = Recipe("", "", "", STREAMS, {"masked": MaskedRegions(**options)})
    return shaken(Model(recipe, facts(STREAMS))).float()


def loss(of: Any, batch: Batch, chunk: int = 64) -> torch.Tensor:
    total, _ = of.loss(batch, {"masked": 1.0}, chunk)(of.encoder("regions")(batch["regions"]))
    return total


def expected(of: Any, batch: Batch, target: str, rows: torch.Tensor) -> torch.Tensor:
    packed = batch["regions"]
    x = of.encoder("regions")(packed)[rows]
    out, tags = of.objectives["masked"].head(x), packed.labels[rows]
    if target == "features":
        return (out - packed.tokens[rows, CROP]).square().sum(1).mean()
    scores = F.one_hot(tags, 5).float()
    if target == "distribution":
        scores = 0.8 * scores + 0.2 / 5
        return F.kl_div(out.log_softmax(1), scores, reduction="batchmean")
    return F.cross_entropy(out, tags)


@pytest.mark.parametrize("target", ["class", "features", "distribution"])
def test_against_plain_torch_however_the_batch_is_cut(target: Any) -> None:
    of, given = model(target=target, smoothing=0.2), batch()
    rows = (given["regions"].labels >= 0).nonzero().flatten()
    assert 4 <= len(rows) < sum(COUNTS)
    for chunk in (1, 3, 64):
        torch.testing.assert_close(loss(of, given, chunk), expected(of, given, target, rows))


@pytest.mark.parametrize("target", ["class", "features"])
def test_swapped_samples_are_skipped(target: Any) -> None:
    """Those without the swapped field (-100) are not."""
    of, given = model(target=target), batch(matched=[1, 0, 0, -100, 1])
    owners = torch.arange(5).repeat_interleave(torch.tensor(COUNTS))
    rows = ((given["regions"].labels >= 0) & (owners != 2)).nonzero().flatten()
    for chunk in (1, 64):
        torch.testing.assert_close(loss(of, given, chunk), expected(of, given, target, rows))


@pytest.mark.parametrize("target", ["class", "features", "distribution"])
@pytest.mark.parametrize("counts", [(0, 0), (0,), (2,)])
def test_nothing_to_predict(target: Any, counts: tuple[int, ...]) -> None:
    given = batch(counts, matched=[0] * len(counts))
    for chunk in (1, 64):
        assert loss(model(target=target), given, chunk).item() == 0


def test_chance() -> None:
    """Even scores: log 5, less the entropy of the softened ones, which no guess can beat."""
    given = batch()
    part = model(target="distribution", smoothing=0.2).objectives["masked"]
    scores = torch.tensor([0.84, 0.04, 0.04, 0.04, 0.04])
    even = F.kl_div(torch.full((5,), 0.2).log(), scores, reduction="sum").item()
    assert part.chance_loss(given) == pytest.approx(even, rel=1e-5)
    assert model(target="class").objectives["masked"].chance_loss(given) == pytest.approx(math.log(5))
    assert model(target="features").objectives["masked"].chance_loss(given) is None


class Fixed:
    """A held-out set of given batches."""

    def __init__(self, *batches: Batch) -> None:
        self.given, self.asked, self.name = batches, "", "x"

    def batches(self, mode: str, objective: str) -> tuple[Batch, ...]:
        assert mode == "loss"
        self.asked = objective
        return self.given

    def once(self, key: tuple[str, ...], make: Callable[[], Any]) -> Any:
        return make()


@pytest.mark.parametrize("target", ["class", "features"])
def test_measured_beside_the_best_blind_guess(target: Any) -> None:
    of, batches = model(target=target), (batch(), batch((9, 8)))
    held_out: Any = Fixed(*batches)
    with torch.no_grad():
        figures = Predictions("masked").measure(of, held_out)
    assert held_out.asked == "masked"
    rows = [(each["regions"].labels >= 0).nonzero().flatten() for each in batches]
    n = sum(map(len, rows))
    mean = sum(expected(of, b, target, r) * len(r) for b, r in zip(batches, rows, strict=True)) / n
    assert figures[-1].value == pytest.approx(mean.item() / (48 if target == "features" else 1), rel=1e-5)
    if target == "features":
        pixels = torch.cat([b["regions"].tokens[r, CROP] for b, r in zip(batches, rows, strict=True)])
        assert figures[0].chance == pytest.approx((pixels - pixels.mean(0)).square().mean().item(), rel=1e-5)
    with torch.no_grad():
        assert Predictions("masked").measure(of, Fixed(batch((0, 0)))) == []  # type: ignore[arg-type]


def test_swapped_pairs_need_both_streams() -> None:
    """Matching reads the label of samples that have both."""
    streams = {"text": Stream(Words(layers=0), views=(Swap(),)), "regions": Stream(PART)}
    matching = Matching("regions", "text", negatives="swapped")
    of = Model(Recipe("", "", "", streams, {"masked": matching}), facts(streams))
    given = batch(matched=[1, 0, 0, -100, 1])  # the second sample has no regions
    ids = [torch.tensor([2, 9, 3])] * 3 + [torch.zeros(0, dtype=torch.int64)] + [torch.tensor([2, 3])]
    given = Batch({"text": PackedBatch.from_samples(ids), **given.streams}, *list(vars(given).values())[1:6])
    found = of.whole(given, "masked")
    _, targets = of.objectives["masked"].logits(found)
    assert targets.tolist() == [1, 0, 1]
    share = 2 / 3  # of those that are judged
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert of.objectives["masked"].chance_loss(given) == pytest.approx(entropy)


def test_wrong_wiring() -> None:
    with pytest.raises(ValueError, match=r"streams.regions.views: expected one that masks regions \(MaskRegions\)"):
        MaskedRegions().build(facts({"regions": Stream(PART)}))
    with pytest.raises(ValueError, match=r"streams.regions.encoder: expected one of regions \(Regions\)"):
        MaskedRegions().build(facts({"regions": Stream(Words(), views=(MaskRegions(),))}))
    with pytest.raises(ValueError, match="target: expected 'class', 'features' or 'distribution'"):
        MaskedRegions(target="pixels")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="smoothing: expected 0 <= smoothing < 1"):
        MaskedRegions(smoothing=1.0)
    assert MaskedRegions(target="features").label == ""
    assert MaskedRegions().label == "tag"
