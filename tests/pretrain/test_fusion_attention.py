"""Which tokens look at which: weighed with it, a fusion's own values give what its attention gave."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from pretrain.packed import WIDTH, shaken, tokens
from torch import Tensor

from mmkernels.pretrain.encoders import DocumentImages, DocumentWords, Patches, Regions, Words
from mmkernels.pretrain.fusion import Co, Cross, Gated, Late, Merged
from mmkernels.pretrain.recipe import Facts, Shape, Stream
from mmkernels.pretrain.tokens import Tokens

LENGTHS = {"text": (3, 0, 4, 2), "regions": (2, 3, 0, 1)}
READS = {"text": Stream(Words(layers=0)), "regions": Stream(Regions())}


def built(part: Any, streams: dict[str, Stream] = READS) -> Any:
    """With one head, so that its mean over the heads is all there is."""
    return shaken(part.build(Facts(Shape(WIDTH, 1, 8), 40, {"tag": tuple("abcde")}, streams)))


def given() -> dict[str, Tokens]:
    return {name: tokens(lengths, seed) for seed, (name, lengths) in enumerate(LENGTHS.items())}


def called(fusion: Any, module: Any, found: dict[str, Tokens]) -> list[tuple[tuple[Any, ...], Tensor]]:
    """Inputs and output of each call of a module while the fusion runs."""
    calls: list[tuple[tuple[Any, ...], Tensor]] = []
    handle = module.register_forward_hook(lambda _, args, out: calls.append((args, out)))
    fusion(found)
    handle.remove()
    return calls


def weighed(module: Any, p: Tensor, context: Tensor) -> Tensor:
    out: Tensor = module.out_proj(p @ module.v_proj(context))
    return out


def test_cross() -> None:
    """Of the last layer; each reader has its own."""
    streams = {"text": READS["text"], "more": READS["text"], "regions": READS["regions"]}
    fusion = built(Cross(into=("text", "more"), context="regions", layers=2), streams)
    found = {**given(), "more": tokens((1, 2, 0, 5), 7)}
    looks = fusion.attention(found)
    assert list(looks) == [("text", "regions"), ("more", "regions")]
    module = fusion.layers[1].cross
    for p, (args, out) in zip(looks.values(), called(fusion, module, found), strict=True):
        torch.testing.assert_close(weighed(module, p, args[1]), out)
    fusion.depth = 1
    (p, _), ((args, out), _) = fusion.attention(found).values(), called(fusion, fusion.layers[0].cross, found)
    torch.testing.assert_close(weighed(fusion.layers[0].cross, p, args[1]), out)
    fusion.depth = 0
    assert fusion.attention(found) == {}


def test_co() -> None:
    fusion, found = built(Co(layers=2)), given()
    looks, pair = fusion.attention(found), fusion.layers[1].co
    assert list(looks) == [("text", "regions"), ("regions", "text")]
    for module, p in zip((pair.a_from_b, pair.b_from_a), looks.values(), strict=True):
        ((args, out),) = called(fusion, module, found)
        torch.testing.assert_close(weighed(module, p, args[1]), out)


def test_gated() -> None:
    """The gate's attention is that of the last block that has one."""
    streams = {"text": Stream(DocumentWords(Words(causal=True))), "image": Stream(DocumentImages(Patches()))}
    fusion = built(Gated(layers=4, every=2), streams)
    media = {"text": [-1, 0, 0, 0, 0, 1, 1, -1, 0], "image": [0, 0, 0, 0, 1, 0]}
    found = {
        name: replace(each, layout=replace(each.layout, media=torch.tensor(media[name], dtype=torch.int32)))
        for name, each in zip(streams, given().values(), strict=True)
    }
    module, looks = fusion.gates["2"].attention, fusion.attention(found)
    assert list(looks) == [("text", "image")]
    ((args, out),) = called(fusion, module, found)
    branch = weighed(module, looks["text", "image"], args[1])
    torch.testing.assert_close(args[0] + module.gate.tanh() * branch, out)
    assert not looks["text", "image"][0].any(), "before the first image a word reads none"
    assert built(Gated(layers=2, shut=True), streams).attention(found) == {}


def test_merged() -> None:
    """With a mask that leaves the own stream out, the other stream is all that a token reads."""
    fusion, found = built(Merged(mask="cross_only", layers=2)), given()
    looks, module = fusion.attention(found), fusion.blocks[1].attention
    ((args, out),) = called(fusion, module, found)
    values = module.qkv_proj(args[0])[:, -WIDTH:]
    places = {"text": [0, 1, 2, 8, 9, 10, 11, 12, 13], "regions": [3, 4, 5, 6, 7, 14]}
    for (reader, read), p in looks.items():
        torch.testing.assert_close(module.out_proj(p @ values[places[read]]), out[places[reader]])
    assert set(looks) == {("text", "regions"), ("regions", "text")}


def test_compiled_blocks_are_not_compiled_for_a_look() -> None:
    fusion, found = built(Merged(layers=1)), given()
    plain, compiled = fusion.attention(found), []
    for block in fusion.blocks:
        block.compile(backend=lambda graph, _: compiled.append(graph) or graph)
    for pair, weights in fusion.attention(found).items():
        torch.testing.assert_close(weights, plain[pair])
    assert not compiled


def test_merged_sees_its_own_stream_too() -> None:
    looks = built(Merged(layers=1)).attention(given())
    share = looks["text", "regions"].sum(1)
    assert ((share[:3] > 0) & (share[:3] < 1)).all()
    assert not share[3:7].any(), "a sample without regions"


def test_no_layers_and_no_attention() -> None:
    assert built(Merged(layers=0)).attention(given()) == {}
    assert built(Late(("text", "regions"), into="text")).attention(given()) == {}
