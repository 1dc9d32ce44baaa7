"""Recall against brute force, and where a careless count would be too high."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from mmkernels.pretrain import ModelConfig
from mmkernels.pretrain.data import RetrievalSet, Tokenizer
from mmkernels.pretrain.evaluate import KS, Embedded, evaluate, ranks
from mmkernels.pretrain.model import DualEncoder


def brute_force(embedded: Embedded, k: int) -> tuple[float, float]:
    """Sort every gallery; a query counts if its answer is among the first k."""
    scores = (embedded.images @ embedded.captions.T).numpy()
    targets = embedded.targets.tolist()
    images = [targets[i] in np.argsort(-scores[i])[:k] for i in range(len(targets))]
    captions = [j in {targets[i] for i in np.argsort(-scores[:, j])[:k]} for j in range(scores.shape[1])]
    return float(np.mean(images)), float(np.mean(captions))


def embedded(images: int, captions: int) -> Embedded:
    targets = torch.cat([torch.arange(captions), torch.randint(captions, (images - captions,))])
    anchors = torch.randn(captions, 8, dtype=torch.float64)
    near = anchors[targets] + 2.0 * torch.randn(images, 8, dtype=torch.float64)
    return Embedded(near, anchors, targets)


@pytest.mark.parametrize(("images", "captions"), [(40, 40), (90, 30), (1200, 700)])
def test_brute_force(images: int, captions: int) -> None:
    space = embedded(images, captions)
    of_images, of_captions = ranks(space)
    for k in KS:
        expected = brute_force(space, k)
        assert 0 < expected[0] < 1
        assert (of_images < k).double().mean().item() == pytest.approx(expected[0])
        assert (of_captions < k).double().mean().item() == pytest.approx(expected[1])


@pytest.mark.parametrize("value", [0.3, float("nan")])
def test_a_collapsed_or_broken_model_finds_nothing(value: float) -> None:
    space = Embedded(torch.full((50, 4), value), torch.full((50, 4), value), torch.arange(50))
    for rank in ranks(space):
        assert rank.tolist() == [49] * 50


def test_several_right_images() -> None:
    space = Embedded(torch.tensor([[0.9, 0], [0.8, 0], [0, 1.0]]), torch.eye(2), torch.tensor([0, 0, 1]))
    assert ranks(space)[1].tolist() == [0, 0]
    space = Embedded(torch.tensor([[0.1, 0], [0.8, 0], [0.9, 1.0]]), torch.eye(2), torch.tensor([0, 0, 1]))
    assert ranks(space)[1].tolist() == [1, 0]
    assert ranks(space)[0].tolist() == [0, 0, 0]


def held_out(images: int, captions: int) -> RetrievalSet:
    rng = np.random.default_rng(0)
    return RetrievalSet(
        "random",
        rng.integers(0, 256, (images, 16, 16, 4), np.uint8),
        [f"thing {i}" for i in range(captions)],
        np.arange(images) % captions,
        [f"{i}.png" for i in range(images)],
    )


def test_evaluate_leaves_no_trace_and_shows_chance() -> None:
    config = ModelConfig(image_size=16, width=16, heads=2, image_layers=1, text_layers=1, embed_dim=8, dropout=0.5)
    model = DualEncoder(config)
    before = torch.get_rng_state()
    sets = {"A": held_out(60, 20), "B": held_out(24, 24)}
    recalls = evaluate(model, sets, Tokenizer())
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert evaluate(model, sets, Tokenizer()) == recalls, "dropout is off"
    for name, recall in recalls.items():
        assert (recall.images, recall.captions) == (len(sets[name].targets), len(sets[name].captions))
        assert recall.chance_image_to_text[5] == pytest.approx(5 / recall.captions)
        for shares in (recall.image_to_text, recall.text_to_image, recall.chance_text_to_image):
            assert all(a <= b for a, b in pairwise(shares.values()))


def test_a_caption_means_the_same_alone_and_in_a_batch() -> None:
    """Packed tokens see only their own segment."""
    model = DualEncoder(ModelConfig(image_size=16, width=16, heads=2)).double().eval()
    tokenizer = Tokenizer()
    captions = ["red", "a very long caption of many words", "two words", "", "x y z"]
    together = model.text(tokenizer(captions))
    for i, caption in enumerate(captions):
        torch.testing.assert_close(model.text(tokenizer([caption]))[0], together[i], rtol=1e-9, atol=1e-12)
    images = torch.randn(5, 3, 16, 16, dtype=torch.float64)
    together = model.image(images)
    for i in range(5):
        torch.testing.assert_close(model.image(images[i : i + 1])[0], together[i], rtol=1e-9, atol=1e-12)
