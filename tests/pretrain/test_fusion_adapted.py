"""Adapters in fusions: where they sit, that they start as nothing, and that the fusion keeps its names."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from pretrain.packed import WIDTH, shaken, tokens

from mmkernels.pretrain.encoders import Regions, Words
from mmkernels.pretrain.fusion import AdaptedFusion, Co, Cross, Gated, Merged, Weighted
from mmkernels.pretrain.recipe import Facts, Shape, Stream
from mmkernels.pretrain.tokens import Tokens

LENGTHS = {"text": (3, 0, 4, 2), "regions": (2, 3, 0, 1)}
STREAMS = {"text": Stream(Words(layers=0)), "regions": Stream(Regions())}
PLACES = {
    Cross(into=("text",), context="regions", layers=2): ("attention", "cross", "feed_forward"),
    Co(layers=1): ("attention.0", "attention.1", "co.a_from_b", "co.b_from_a", "feed_forward.0", "feed_forward.1"),
    Merged(("text", "regions"), layers=2): ("attention", "feed_forward"),
}


def built(part: Any) -> Any:
    torch.manual_seed(0)
    return part.build(Facts(Shape(WIDTH, 2, 8), 40, {"tag": tuple("abcde")}, STREAMS))


def given() -> dict[str, Tokens]:
    return {name: tokens(lengths, seed) for seed, (name, lengths) in enumerate(LENGTHS.items())}


@pytest.mark.parametrize("part", PLACES, ids=lambda part: type(part).__name__)
def test_the_fusion_keeps_its_names_and_its_result(part: Any) -> None:
    base, adapted = shaken(built(part)), built(AdaptedFusion(part, reduction=4)).double()
    missing = adapted.load_state_dict(base.state_dict(), strict=False)
    assert not missing.unexpected_keys
    layers = "blocks" if isinstance(part, Merged) else "layers"
    sites = {f"{layers}.{i}.{place}.adapter" for i in range(part.layers) for place in PLACES[part]}
    assert {name.rpartition(".adapter.")[0] + ".adapter" for name in missing.missing_keys} == sites
    before, after = base(given()), adapted(given())
    assert before.keys() == after.keys() and all(torch.equal(before[name].x, after[name].x) for name in before)
    assert base.attention(given()).keys() == adapted.attention(given()).keys()


@pytest.mark.parametrize("part", PLACES, ids=lambda part: type(part).__name__)
def test_every_adapter_has_a_say(part: Any) -> None:
    adapted = shaken(built(AdaptedFusion(part, reduction=4)))
    result = adapted(given())
    sum(each.x.square().sum() for each in result.values()).backward()
    grads = [p.grad for name, p in adapted.named_parameters() if ".adapter." in name]
    assert grads and all(grad is not None and bool(grad.any()) for grad in grads)


def test_gates_add_by_themselves() -> None:
    part = AdaptedFusion(Gated(into="text", context="regions", layers=2, every=1), reduction=4)
    names = [name for name, _ in built(part).named_parameters() if name.endswith("adapter.down.weight")]
    assert sorted(names) == sorted(
        [f"gates.{i}.feed_forward.adapter.down.weight" for i in range(2)]
        + [f"layers.{i}.{what}.adapter.down.weight" for i in range(2) for what in ("attention", "feed_forward")]
    )


def test_it_passes_for_its_fusion() -> None:
    part = AdaptedFusion(Cross(into=("text",), context="regions"))
    assert (part.into, part.context, part.layers) == (("text",), "regions", 2)
    assert not hasattr(part, "mask")
    assert pickle.loads(pickle.dumps(part)) == part == copy.deepcopy(part)
    with pytest.raises(ValueError, match="reduction: expected at least 1, got 0"):
        AdaptedFusion(Co(), reduction=0)
    with pytest.raises(ValueError, match="fusion: expected one with layers"):
        built(AdaptedFusion(Weighted(("text", "regions"), into="text")))
