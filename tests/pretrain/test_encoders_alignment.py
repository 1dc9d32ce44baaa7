"""Frozen vectors, word vectors made once, and graphs of regions."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pretrain.packed import WIDTH, facts, shaken
from pretrain.runs import TINY

from mmkernels import PackedBatch
from mmkernels.pretrain import Config, cooccurrence, load_model, train
from mmkernels.pretrain.cooccurrence import together, vectors_of
from mmkernels.pretrain.data import Regions as Found
from mmkernels.pretrain.data import Text
from mmkernels.pretrain.encoders import Frozen, Graph, HashedWords, WordVectors
from mmkernels.pretrain.encoders.graph import neighbours
from mmkernels.pretrain.hashing import word_hashes
from mmkernels.pretrain.recipe import Stream
from mmkernels.pretrain.tokenizer import TextTokenizer
from mmkernels.pretrain.tokens import Layout

NONE: Any = None  # tokenizer, where none is needed


def test_frozen() -> None:
    part = Frozen(size=WIDTH)
    values = [np.ones(WIDTH, np.float32), None, np.zeros((2, WIDTH), np.float16)]
    batch = PackedBatch.from_samples([piece.tokens for piece in part.prepare(values, NONE)])
    module = part.build(facts({}))
    assert not list(module.parameters())
    assert module.layout(batch).cu_seqlens_host == (0, 1, 1, 3)
    torch.testing.assert_close(module(batch), torch.tensor([[1.0], [0.0], [0.0]]).expand(3, WIDTH))
    assert [part.length(value, NONE) for value in values] == [1, 0, 2]
    assert Frozen(size=3).build(facts({}))(PackedBatch.from_samples([torch.ones(2, 3)])).shape == (2, WIDTH)
    for wrong in (np.ones(3), np.ones((1, 1, WIDTH)), np.full(WIDTH, np.nan)):
        with pytest.raises(ValueError, match=r"value: expected finite numbers \[16\] or \[k, 16\], got"):
            part.prepare([wrong], NONE)
    with pytest.raises(ValueError, match="size: expected at least 1, got 0"):
        Frozen(size=0)


def test_word_vectors_factor_the_information(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a dense decomposition of the matrix, entry by entry."""
    texts = [[0, 1, 2], [1, 2, 3], [0, 4], [4, 5], [5, 6, 0], [2, 3], [7]]
    counts = torch.zeros(9, 9, dtype=torch.float64)
    for text in texts:
        for i in text:
            for j in text:
                counts[i, j] += i != j
    information = (counts * counts.sum() / (counts.sum(0) * counts.sum(1, keepdim=True))).log().nan_to_num(0, 0, 0)
    u, values, _ = torch.linalg.svd(information.clamp(min=0))
    assert values[3] > values[4] + 0.01, "four are well defined"
    expected = u[:, :4] * values[:4].sqrt()
    found = vectors_of(together(texts, 9), 4, seed=0)
    torch.testing.assert_close(found @ found.T, expected @ expected.T, atol=1e-9, rtol=1e-9)
    assert (found[[7, 8]].abs() < 1e-9).all(), "tokens without company"
    assert vectors_of(together(texts, 9), 20, seed=3).shape == (9, 20)
    assert (vectors_of(together([[], [3]], 9), 4, seed=0) == 0).all()
    monkeypatch.setattr(cooccurrence, "_PAIRS", 10)  # counted in several parts
    assert torch.equal(together(texts, 9).to_dense(), counts)


def test_word_vectors_of_texts() -> None:
    texts = ["cat kitten pet", "dog kitten pet", "cat dog puppy", "car truck road", "bus truck road", "car bus lane"]
    tokenizer = TextTokenizer.train(texts, 340)
    part = WordVectors()
    own = facts({})
    module: Any = part.build(type(own)(own.shape, len(tokenizer), own.classes, own.streams))
    assert (module.table == 0).all()
    module.learn(texts, tokenizer)
    assert not list(module.parameters())
    assert module.state_dict()["table"].shape == (len(tokenizer), WIDTH)
    words = ["cat", "dog", "car", Text(("bus", "coach"))]
    batch = PackedBatch.from_samples([piece.tokens for piece in part.prepare([*words, None], tokenizer)])
    ends = batch.cu_seqlens_host
    x = torch.stack([module(batch)[a:b].mean(0) for a, b in pairwise(ends[:5])])
    x = torch.nn.functional.normalize(x, dim=1)
    assert x[0] @ x[1] > x[0] @ x[2] + 0.2
    assert x[2] @ x[3] > x[0] @ x[3] + 0.2
    assert [part.length(word, tokenizer) for word in (*words, None)] == list(np.diff(ends))
    again: Any = part.build(type(own)(own.shape, len(tokenizer), own.classes, own.streams))
    again.learn(texts, tokenizer)
    assert torch.equal(again.table, module.table)
    with pytest.raises(ValueError, match="texts: expected training texts to make word vectors of, got none"):
        module.learn([], tokenizer)


def test_hashed_words_begin_as_word_vectors() -> None:
    texts = ["cat kitten pet", "dog kitten pet", "cat dog puppy", "car truck road", "bus truck road", "car bus lane"]
    texts.append("tree")
    words = ["cat", "dog", "car", "bus", "zeppelin", "tree"]
    rows = [word_hashes(word, 4096, 2, 1)[0][0] for word in words]
    module: Any = HashedWords(vectors=True).build(facts({}))
    before = module.words.weight.detach().clone()
    module.learn(texts, NONE)
    x = module.words.weight[rows].detach()
    torch.testing.assert_close(x[:5].norm(dim=1), torch.tensor([1, 1, 1, 1, 0]) * 0.5 * WIDTH**0.5)
    assert torch.equal(x[5], before[rows[5]]), "without company"
    x = torch.nn.functional.normalize(x, dim=1)
    assert x[0] @ x[1] > x[0] @ x[2] + 0.2 and x[2] @ x[3] > x[0] @ x[3] + 0.2
    again: Any = HashedWords(vectors=True).build(facts({}))
    again.learn(texts, NONE)
    assert torch.equal(again.words.weight[rows[:5]], module.words.weight[rows[:5]])
    with pytest.raises(ValueError, match="texts: expected training texts to make word vectors of, got none"):
        module.learn([], NONE)
    torch.manual_seed(0)
    random: Any = HashedWords().build(facts({}))
    before = random.words.weight.clone()
    random.learn(texts, NONE)
    assert torch.equal(random.words.weight, before), "without being asked for"


def test_a_run_begins_with_word_vectors(tmp_path: Path) -> None:
    """Those of its training texts; a step that hardly moves leaves them."""
    parts = {**TINY, "model.width": 32, "streams.text.encoder.words": 4096, "streams.text.encoder.vectors": True}
    config = Config(steps=1, lr=1e-12, warmup=0, batch=32, eval_limit=8, tensorboard=False, run=tmp_path, parts=parts)
    train(config)
    encoder: Any = load_model(tmp_path).model.encoder("text").encoder
    table = encoder.words.weight
    assert (table == 0).all(1).any(), "rows of words that do not occur"
    rows = [word_hashes(word, 4096, 2, 1)[0][0] for word in ("apple", "bread", "smile")]
    apple, bread, smile = torch.nn.functional.normalize(table[rows], dim=1)
    assert apple @ bread > apple @ smile + 0.2


# ------------------------------------------------------------------------------------------------ graphs


def adjacency(boxes: torch.Tensor, near: float) -> torch.Tensor:
    n = len(boxes)
    edges = torch.eye(n, dtype=torch.bool)
    for i in range(n):
        for j in range(n):
            dx = max(0.0, float(boxes[j, 0] - boxes[i, 2]), float(boxes[i, 0] - boxes[j, 2]))
            dy = max(0.0, float(boxes[j, 1] - boxes[i, 3]), float(boxes[i, 1] - boxes[j, 3]))
            edges[i, j] |= (dx**2 + dy**2) ** 0.5 <= near
    return edges


def boxes_of(n: int, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    corner = 0.9 * torch.rand((n, 2), generator=random)
    return torch.cat([corner, corner + 0.1], 1)


@pytest.mark.parametrize("near", [0.0, 0.15, 2.0])
def test_neighbours(near: float) -> None:
    """Of samples with no node, one, and as many as there may be."""
    lengths = (3, 0, 32, 1)
    ends = (0, 3, 3, 35, 36)
    parts = [boxes_of(n, seed) for seed, n in enumerate(lengths)]
    layout = Layout(torch.tensor(ends, dtype=torch.int32), ends)
    expected = torch.block_diag(*(adjacency(part, near).float() for part in parts if len(part))).bool()
    assert torch.equal(neighbours(torch.cat(parts), layout, near).to_dense(), expected)


def test_graph_attention() -> None:
    """Each image by itself, by the formula."""
    part = Graph(layers=2, side=4, near=0.2)
    module: Any = shaken(part.build(facts({"regions": Stream(part)})))
    random = np.random.default_rng(0)
    values: list[Any] = [
        Found(boxes_of(n, n).numpy(), random.integers(0, 256, (n, 4, 4, 3)).astype(np.uint8), np.zeros(n, np.int64))
        for n in (5, 3)
    ]
    pieces = part.prepare([values[0], None, values[1]], NONE)
    batch = PackedBatch.from_samples([piece.tokens.double() for piece in pieces])
    got = module(batch)
    expected = []
    for value, piece in zip(values, (pieces[0], pieces[2]), strict=True):
        x = module.nodes(PackedBatch.from_samples([piece.tokens.double()]))
        edges = adjacency(torch.from_numpy(value.boxes), 0.2)
        for layer in module.layers:
            normed = layer.norm(x)
            q, k = (f(normed).view(len(x), 2, -1) for f in (layer.left, layer.right))
            scores = torch.einsum("ijhd,hd->hij", (q[:, None] + k[None]).tanh(), layer.score)
            weights = scores.masked_fill(~edges, -torch.inf).softmax(-1)
            x = x + layer.out(torch.einsum("hij,jhd->ihd", weights, k).flatten(1))
            x = x + layer.feed_forward(x)
        expected.append(x)
    torch.testing.assert_close(got, torch.cat(expected))
    assert module(PackedBatch.from_samples([pieces[1].tokens.double()])).shape == (0, WIDTH)


def test_a_graph_has_a_largest_size() -> None:
    many = Found(boxes_of(33, 0).numpy(), np.zeros((33, 4, 4, 3), np.uint8), np.zeros(33, np.int64))
    with pytest.raises(ValueError, match="value: expected at most 32 regions, got 33"):
        Graph().prepare([many], NONE)
    with pytest.raises(ValueError, match="near: expected at least 0, got -1"):
        Graph(near=-1)
