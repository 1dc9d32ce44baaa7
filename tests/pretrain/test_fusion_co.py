"""Co: two streams that attend to each other, against a loop over samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pretrain.packed import attended, facts, heads_of, sample, self_attended, shaken, tokens
from torch import Tensor

from mmkernels.pretrain.encoders import Regions, Words
from mmkernels.pretrain.fusion import Co
from mmkernels.pretrain.recipe import Stream

STREAMS = {"text": Stream(Words(layers=0)), "regions": Stream(Regions())}
LENGTHS = {"text": (3, 0, 4, 2), "regions": (2, 3, 0, 1)}


def crossed(attention: Any, x: Tensor, context: Tensor) -> Tensor:
    q, k, v = (
        heads_of(p, 2, None, None) for p in (attention.q_proj(x), attention.k_proj(context), attention.v_proj(context))
    )
    out: Tensor = attention.out_proj(attended(q, k, v, torch.ones(len(x), len(context), dtype=torch.bool)))
    return out


def oracle(fusion: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    for layer in fusion.layers:
        x = []
        for i, each in enumerate((a, b)):
            seen = torch.ones(len(each), len(each), dtype=torch.bool)
            normed = layer.norms_self[i](each)
            x.append(each + self_attended(layer.attention[i], normed, seen, torch.arange(len(each))))
        na, nb = (layer.norms_co[i](x[i]) for i in range(2))
        a, b = x[0] + crossed(layer.co.a_from_b, na, nb), x[1] + crossed(layer.co.b_from_a, nb, na)
        a, b = a + layer.feed_forward[0](a), b + layer.feed_forward[1](b)
    return a, b


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_each_sample_by_itself(paired: bool, recompute: bool) -> None:
    fusion = shaken(Co(layers=2).build(facts(STREAMS, recompute=recompute)))
    found = {name: tokens(lengths, seed) for seed, (name, lengths) in enumerate(LENGTHS.items())}
    picks = {"text": [3, 3, 0, 2], "regions": [0, 1, 3, 3]} if paired else {name: [0, 1, 2, 3] for name in LENGTHS}
    out = fusion(found, {k: torch.tensor(v) for k, v in picks.items()} if paired else None)
    pairs = [
        oracle(fusion, sample(found["text"], i), sample(found["regions"], j))
        for i, j in zip(*picks.values(), strict=True)
    ]
    expected = {"text": torch.cat([a for a, _ in pairs]), "regions": torch.cat([b for _, b in pairs])}
    leaves = [each.x for each in found.values()] + list(fusion.parameters())
    for name, rows in expected.items():
        torch.testing.assert_close(out[name].x, rows)
    got, wanted = (
        torch.autograd.grad(text.square().sum() + regions.square().mean(), leaves)
        for text, regions in ((out["text"].x, out["regions"].x), expected.values())
    )
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_depth_and_nothing() -> None:
    fusion = shaken(Co(layers=2).build(facts(STREAMS)))
    found = {name: tokens(lengths, seed) for seed, (name, lengths) in enumerate(LENGTHS.items())}
    fusion.depth = 0
    torch.testing.assert_close(fusion(found)["text"].x, found["text"].x, rtol=0, atol=0)
    fusion.depth = None
    nothing = fusion({"text": tokens((2, 1)), "regions": tokens((0, 0))})
    assert nothing["text"].x.isfinite().all()
    assert len(nothing["regions"].x) == 0


def test_wrong_wiring() -> None:
    with pytest.raises(ValueError, match=r"fusion\.a, fusion\.b: expected two different streams of text, regions"):
        Co("text", "image").build(facts(STREAMS))
    with pytest.raises(ValueError, match=r"fusion\.a, fusion\.b"):
        Co("text", "text").build(facts(STREAMS))
    with pytest.raises(ValueError, match=r"streams.text.encoder: expected one that is not causal"):
        Co().build(facts({**STREAMS, "text": Stream(Words(causal=True))}))
