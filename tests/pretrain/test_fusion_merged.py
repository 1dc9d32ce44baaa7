"""Merged: one sequence of several streams, against a loop over samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pretrain.packed import WIDTH, facts, plain_block, sample, shaken, tokens
from torch import Tensor

from mmkernels.pretrain.encoders import Regions, Words
from mmkernels.pretrain.fusion import Merged
from mmkernels.pretrain.recipe import Stream
from mmkernels.pretrain.tokens import Tokens

LENGTHS = {"text": (3, 0, 4, 2), "regions": (2, 3, 0, 1), "tags": (1, 2, 2, 0)}


def streams(causal: bool = False) -> dict[str, Stream]:
    return {
        "regions": Stream(Regions()),
        "tags": Stream(Words(layers=0)),
        "text": Stream(Words(layers=0, causal=causal)),
    }


def built(names: tuple[str, ...], **options: Any) -> Any:
    part = Merged(names, layers=2, **options)
    return shaken(part.build(facts(streams(causal=options.get("mask") == "prefix"))))


def given() -> dict[str, Tokens]:
    return {name: tokens(lengths, seed) for seed, (name, lengths) in enumerate(LENGTHS.items())}


def visible(mask: str, kinds: Tensor) -> Tensor:
    """bool [L, L] of one sample; kinds [L] ascend."""
    if mask == "cross_only":
        return kinds[:, None] != kinds
    at = torch.arange(len(kinds))
    if mask == "prefix":
        return (at[:, None] >= at) | (kinds != 2)
    return torch.ones(len(kinds), len(kinds), dtype=torch.bool)


def oracle(fusion: Any, found: dict[str, Tokens], picked: dict[str, int]) -> Tensor:
    """One sample of the merged stream, of the given samples of each stream."""
    part = fusion.part
    xs = {name: sample(found[name], picked[name]) for name in part.streams}
    kinds = torch.cat([torch.full((len(x),), k) for k, x in enumerate(xs.values())])
    positions = torch.cat([torch.arange(len(x)) for x in xs.values()])
    x = torch.cat(list(xs.values())) + fusion.kinds.weight[kinds]
    if part.everywhere and len(xs[part.everywhere]):
        project, norm = fusion.everywhere
        mean = F.layer_norm(xs[part.everywhere].mean(0) @ project.weight.T, (WIDTH,)) * norm.weight
        x = x + mean * (kinds != part.streams.index(part.everywhere))[:, None]
    for block in fusion.blocks:
        x = plain_block(block, x, visible(part.mask, kinds), positions)
    return x


@pytest.mark.parametrize(
    "options", [{}, {"mask": "cross_only"}, {"mask": "prefix"}, {"everywhere": "regions"}], ids=str
)
@pytest.mark.parametrize("paired", [False, True])
def test_each_sample_by_itself(options: dict[str, Any], paired: bool) -> None:
    """Values and gradients, and each stream's part is where it belongs; with a pairing, partners take its place."""
    names = ("regions", "tags", "text")
    fusion, found = built(names, **options), given()
    pairing = {"regions": [1, 0, 0, 3, 2], "tags": [0, 0, 1, 2, 3], "text": [3, 2, 2, 0, 1]} if paired else None
    picks = {name: pairing[name] if pairing else list(range(4)) for name in names}
    out = fusion(found, None if pairing is None else {k: torch.tensor(v) for k, v in pairing.items()})
    expected = [oracle(fusion, found, {name: picks[name][i] for name in names}) for i in range(len(picks["text"]))]
    whole = out["merged"]
    torch.testing.assert_close(whole.x, torch.cat(expected))
    assert whole.layout.cu_seqlens.tolist() == list(whole.layout.cu_seqlens_host)
    for i, rows in enumerate(expected):
        torch.testing.assert_close(sample(whole, i), rows)
        parts = torch.cat([sample(out[name], i) for name in names])
        torch.testing.assert_close(parts, rows)
    weight = torch.randn(whole.x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    leaves = [found[name].x for name in names] + list(fusion.parameters())
    got = torch.autograd.grad((whole.x * weight).sum(), leaves, allow_unused=True)
    wanted = torch.autograd.grad((torch.cat(expected) * weight).sum(), leaves, allow_unused=True)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_a_prefix_hides_what_follows() -> None:
    """A later token of the last stream changes no earlier one, nor the prefix."""
    fusion, found = built(("regions", "tags", "text"), mask="prefix"), given()
    before = fusion(found)
    changed = found["text"].x.detach().clone()
    changed[2] += 1  # the last of sample 0
    after = fusion({**found, "text": found["text"].with_x(changed)})
    for name in ("regions", "tags"):
        torch.testing.assert_close(after[name].x, before[name].x, rtol=0, atol=0)
    differs = (after["text"].x != before["text"].x).any(1)
    assert differs.nonzero().flatten().tolist() == [2]


def test_cross_only_sees_no_word_of_its_own_stream() -> None:
    part = Merged(("regions", "text"), layers=1, mask="cross_only")
    fusion, found = shaken(part.build(facts(streams()))), given()
    before = fusion(found)["text"].x
    changed = found["text"].x.detach().clone()
    changed[0] += 1
    after = fusion({**found, "text": found["text"].with_x(changed)})["text"].x
    assert (after != before).any(1).nonzero().flatten().tolist() == [0]


def test_what_is_everywhere_need_not_be_merged() -> None:
    fusion, found = built(("tags", "text"), everywhere="regions"), given()
    out = fusion(found)["merged"]
    without = fusion({**found, "regions": tokens((0, 0, 0, 0))})["merged"]
    same = [torch.equal(sample(out, i), sample(without, i)) for i in range(4)]
    assert same == [False, False, True, False]  # the third sample has no regions


def test_depth_and_absent_streams() -> None:
    fusion, found = built(("regions", "text")), given()
    fusion.depth = 0
    out = fusion(found)["text"].x
    torch.testing.assert_close(out, found["text"].x + fusion.kinds.weight[1])
    fusion.depth = None
    nothing = {name: tokens((0, 0)) for name in ("regions", "text")}
    assert fusion(nothing)["merged"].x.shape == (0, WIDTH)
    alone = fusion(found, {"text": torch.tensor([2, 0])})
    assert set(alone) == {"merged", "text"}
    assert alone["merged"].layout.cu_seqlens_host == (0, 4, 7)


@pytest.mark.parametrize(
    ("part", "causal", "message"),
    [
        (Merged(("text",)), False, "fusion.streams"),
        (Merged(("text", "text")), False, "fusion.streams"),
        (Merged(("text", "speech")), False, "fusion.streams.*regions, tags, text, got text, speech"),
        (Merged(("text", "tags"), everywhere="speech"), False, "everywhere"),
        (Merged(("text", "tags"), into="regions"), False, "fusion.into"),
        (Merged(("text", "tags"), mask="some"), False, "fusion.mask"),  # type: ignore[arg-type]
        (Merged(("text", "regions")), True, "streams.text.encoder: expected one that is not causal"),
        (Merged(("text", "regions"), mask="prefix"), True, "streams.text.encoder: expected one that is not causal"),
        (Merged(("tags", "text"), mask="prefix"), False, "streams.text.encoder: expected a causal one"),
    ],
)
def test_wrong_wiring(part: Merged, causal: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        part.build(facts(streams(causal)))
