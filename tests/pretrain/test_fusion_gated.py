"""Gated: a language model that reads images, against a loop over samples."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pretrain.packed import attended, facts, heads_of, plain_block, sample, shaken, tokens
from torch import Tensor

from mmkernels.pretrain.encoders import DocumentImages, DocumentWords, Patches, Words
from mmkernels.pretrain.fusion import Gated
from mmkernels.pretrain.metrics import Ablation
from mmkernels.pretrain.recipe import Stream
from mmkernels.pretrain.tokens import Tokens

STREAMS = {"text": Stream(DocumentWords(Words(causal=True))), "image": Stream(DocumentImages(Patches()))}
LENGTHS = {"text": (5, 3, 0, 4), "image": (4, 0, 2, 3)}
MEDIA = {"text": [-1, 0, 0, 1, 1, -1, -1, -1, 0, 0, 2, 2], "image": [0, 0, 1, 1, 0, 0, 0, 1, 2]}


def built(**options: Any) -> Any:
    return Gated(**{"layers": 3, **options}).build(facts(STREAMS))


def given() -> dict[str, Tokens]:
    found = {name: tokens(lengths, seed) for seed, (name, lengths) in enumerate(LENGTHS.items())}
    return {
        name: replace(
            each,
            layout=replace(each.layout, causal=name == "text", media=torch.tensor(MEDIA[name], dtype=torch.int32)),
        )
        for name, each in found.items()
    }


def oracle(fusion: Any, x: Tensor, context: Tensor, visible: Tensor) -> Tensor:
    """One sample: [L, C], [Lk, C], bool [L, Lk]."""
    at = torch.arange(len(x))
    for i, block in enumerate(fusion.layers):
        if str(i) in fusion.gates:
            gate = fusion.gates[str(i)]
            a, seen = gate.attention, gate.norm_context(context)
            q, k, v = a.q_proj(a.norm(x)), a.k_proj(seen), a.v_proj(seen)
            read = a.out_proj(attended(*(heads_of(y, a.num_heads, None, None) for y in (q, k, v)), visible))
            x = x + a.gate.tanh() * read
            x = x + gate.gate.tanh() * gate.feed_forward(x)
        x = plain_block(block, x, at[:, None] >= at, at)
    return x


@pytest.mark.parametrize("mode", ["last", "all_previous"])
@pytest.mark.parametrize("paired", [False, True])
def test_each_sample_by_itself(mode: str, paired: bool) -> None:
    """Values and gradients; every second block has a gate."""
    fusion, found = shaken(built(every=2, mode=mode)), given()
    assert list(fusion.gates) == ["0", "2"]
    partners = {"text": [3, 0, 1, 2, 0], "image": [0, 0, 3, 1, 2]} if paired else {n: [0, 1, 2, 3] for n in LENGTHS}
    pairing = {name: torch.tensor(samples) for name, samples in partners.items()} if paired else None
    out = fusion(found, pairing)["text"]
    media = {n: Tokens(t.layout.media[:, None].double(), t.layout) for n, t in found.items()}
    expected = []
    for text, image in zip(*partners.values(), strict=True):
        a, b = sample(media["text"], text)[:, 0], sample(media["image"], image)[:, 0]
        visible = b <= a[:, None]
        if mode == "last" and len(b):
            newest = torch.where(visible, b, -1).amax(1)
            visible = visible & (b == newest[:, None])
        expected.append(oracle(fusion, sample(found["text"], text), sample(found["image"], image), visible))
    torch.testing.assert_close(out.x, torch.cat(expected))
    inputs = [*(each.x for each in found.values()), *fusion.parameters()]
    weight = torch.randn(out.x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ours = torch.autograd.grad((out.x * weight).sum(), inputs)
    theirs = torch.autograd.grad((torch.cat(expected) * weight).sum(), inputs)
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


def test_gates_start_shut() -> None:
    """At first it is a model of the text alone, and only the gates have a gradient that could open them."""
    fusion, found = built(), given()
    shaken(fusion.layers)
    fusion.double()
    text = fusion(found)["text"]
    fusion.part = replace(fusion.part, shut=True)
    fusion.gates.clear()
    assert torch.equal(text.x, fusion(found)["text"].x)
    alone = built(shut=True)
    assert not [name for name, _ in alone.named_parameters() if "gates" in name]


def test_gates_learn_before_what_they_shut() -> None:
    fusion, found = built(), given()
    shaken(fusion.layers)
    fusion.double()
    fusion(found)["text"].x.square().sum().backward()
    moved = {name for name, p in fusion.gates.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == {f"{i}.{name}" for i in range(3) for name in ("gate", "attention.gate")}


def test_depth() -> None:
    fusion, found = shaken(built()), given()
    fusion.depth = 0
    assert torch.equal(fusion(found)["text"].x, found["text"].x)
    fusion.depth = 2
    two = fusion(found)["text"].x
    del fusion.layers[2:]
    fusion.depth = None
    assert torch.equal(two, fusion(found)["text"].x)


def test_chunks() -> None:
    fusion, found = shaken(built()), given()
    whole = fusion(found)["text"].x
    parts = [fusion({n: t.between(i, i + 2) for n, t in found.items()})["text"].x for i in (0, 2)]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_a_sample_without_numbers_has_one_item() -> None:
    """A text with an image, as other encoders make them."""
    fusion, found = shaken(built()), given()
    plain = {name: replace(each, layout=replace(each.layout, media=None)) for name, each in found.items()}
    visible = [torch.ones(a, b, dtype=torch.bool) for a, b in zip(*LENGTHS.values(), strict=True)]
    expected = [oracle(fusion, sample(plain["text"], i), sample(plain["image"], i), visible[i]) for i in range(4)]
    torch.testing.assert_close(fusion(plain)["text"].x, torch.cat(expected))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": "sound"}, "expected one of the streams text, image, got 'sound'"),
        ({"every": 0}, "fusion.every: expected at least 1"),
        ({"mode": "own"}, "fusion.mode: expected"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built(**options)


class Objective:
    """Two classes; the logits are the first two features of the text."""

    def logits(self, chunk: Any) -> tuple[Tensor, Tensor]:
        x = chunk.fused["text"].x[:, :2]
        return x, torch.arange(len(x)) % 2

    def owners(self, chunk: Any) -> Tensor:
        owners: Tensor = chunk.fused["text"].layout.owners()
        return owners


@pytest.mark.parametrize(
    ("concepts", "others"), [((0, 1, 2, 3), [1, 2, 3, 0]), ((0, 0, 1, 1), [2, 2, 0, 0]), ((5, 5, 5, 5), None)]
)
def test_ablation(concepts: tuple[int, ...], others: list[int] | None) -> None:
    """With the images of a sample of another concept, and without any, as if the batch had been so."""
    fusion, found = shaken(built()), given()
    batch = SimpleNamespace(samples=4, concepts=torch.tensor(concepts), numbers=[7, 8, 9, 10])

    def whole(batch: Any, objective: str) -> Any:
        return SimpleNamespace(tokens=found, fused={**found, **fusion(found)})

    model = SimpleNamespace(fusion=fusion, objectives={"words": Objective()}, whole=whole)
    held_out = SimpleNamespace(batches=lambda mode, objective: [batch])
    with torch.no_grad():
        right, without = Ablation("words", "image").measure(model, held_out)
        other = fusion({**found, "image": found["image"].take(torch.tensor(others or [0, 1, 2, 3]))})["text"]
        none = fusion({**found, "image": found["image"].take(torch.tensor([1, 1, 1, 1]))})["text"]  # an empty one

    def loss(x: Tensor) -> float:
        return F.cross_entropy(x[:, :2], torch.arange(len(x)) % 2).item()

    assert right.value == pytest.approx(loss(fusion(found)["text"].x))
    assert right.chance == without.chance == (None if others is None else pytest.approx(loss(other.x)))
    assert without.value == pytest.approx(loss(none.x))
    assert len({right.value, right.chance, without.value}) == 3
    for figure in (right, without):
        if len(set(concepts)) == 1:
            assert figure.low is None and figure.high is None, "all is drawn together"
        else:
            assert figure.low is not None and figure.high is not None and figure.low < figure.value < figure.high
    both = SimpleNamespace(
        batches=lambda mode, objective: [batch, SimpleNamespace(**{**vars(batch), "concepts": same})]
    )
    same = torch.zeros(4, dtype=torch.int64)
    with torch.no_grad():
        again, _ = Ablation("words", "image").measure(model, both)
    assert again.chance == right.chance, "a batch of one concept has no other sample"
    model.fusion = None
    with pytest.raises(ValueError, match="a recipe with a fusion"):
        Ablation("words", "image").measure(model, held_out)


def test_gates_that_are_passed_by_are_as_if_shut() -> None:
    fusion, found = shaken(built(every=2)), given()
    open_ = fusion(found)["text"].x
    fusion.shut = True
    passed = fusion(found)["text"].x
    fusion.shut = False
    with torch.no_grad():
        for gate in fusion.gates.values():
            gate.gate.zero_()
            gate.attention.gate.zero_()
    torch.testing.assert_close(passed, fusion(found)["text"].x)
    assert not torch.allclose(passed, open_)
