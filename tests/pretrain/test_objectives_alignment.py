"""Objectives that align embeddings without a softmax, against plain loops and closed forms in float64."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pretrain.packed import facts, shaken
from torch import Tensor

from mmkernels import Media, Modality, PackedBatch
from mmkernels.pretrain.encoders import Frozen, HashedWords, Patches, Words
from mmkernels.pretrain.objectives import Correlation, Cycle, HingeRank, Reconstruct, hinge_rank
from mmkernels.pretrain.recipe import Stream
from mmkernels.pretrain.roster import Roster


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seen(have: list[tuple[bool, bool]], concepts: list[int] | None = None, size: int = 8, **streams: Any) -> Any:
    """Embeddings of two streams, zero where a sample lacks one."""
    present = torch.tensor(have).reshape(-1, 2)
    n = len(present)
    x = {
        name: (F.normalize(draw(n, size, seed=i), dim=1) * present[:, i, None]).requires_grad_()
        for i, name in enumerate(("image", "text"))
    }
    column = {"image": present[:, 0], "text": present[:, 1]}
    ids = torch.tensor(concepts or list(range(n)))
    roster = Roster.of(ids, {name: each.long() for name, each in column.items()})
    return SimpleNamespace(
        batch=FakeBatch(streams, n, ids),
        roster=roster,
        everyone=lambda *names: ([x[name] for name in names], roster.present(*names)),
        embedding=x.__getitem__,
        present=lambda *names: torch.stack([column[name] for name in names]).all(0),
        x=x,
    )


@dataclass
class FakeBatch:
    streams: dict[str, Any]
    samples: int
    concepts: Tensor

    def __getitem__(self, name: str) -> Any:
        return self.streams[name]


ALL = [(True, True)] * 9
SOME = [(True, True), (True, False), (False, True), (True, True), (True, True), (False, False)]
NONE = [(True, False), (False, True)]


# ------------------------------------------------------------------------------------------------ hinge rank


@pytest.mark.parametrize("block", [2, 1024])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("have", "concepts"), [(ALL, [0, 1, 2, 0, 3, 4, 4, 4, 5]), (SOME, None)])
def test_hinge_rank(block: int, symmetric: bool, have: Any, concepts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hinge_rank, "_BLOCK", block)
    loss = HingeRank(margin=0.7, symmetric=symmetric).build(facts({}))
    batch = seen(have, concepts)
    ids = batch.batch.concepts.tolist()

    def one_way(a: Tensor, b: Tensor) -> Tensor:
        rows = []
        for i in range(len(have)):
            wrong = [j for j in range(len(have)) if all(have[i]) and all(have[j]) and ids[j] != ids[i]]
            if wrong:
                hinges = [(0.7 - a[i] @ b[i] + a[i] @ b[j]).clamp(min=0) for j in wrong]
                rows.append(torch.stack(hinges).mean())
        return torch.stack(rows).mean()

    a, b = batch.x["image"], batch.x["text"]
    expected = (one_way(a, b) + one_way(b, a)) / 2 if symmetric else one_way(a, b)
    got = loss.over_batch(batch)
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-6)
    leaves = list(batch.x.values())
    for x, y in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)
    assert loss.chance_loss(batch.batch) == 0.7


@pytest.mark.parametrize("concepts", [[0, 0], [3, 3]])
def test_hinge_rank_without_a_wrong_key(concepts: list[int]) -> None:
    loss = HingeRank().build(facts({}))
    for batch in (seen([(True, True)] * 2, concepts), seen(NONE)):
        value = loss.over_batch(batch)
        assert value == 0
        assert all((g == 0).all() for g in torch.autograd.grad(value, list(batch.x.values())))
    with pytest.raises(ValueError, match="margin: expected a positive number, got 0"):
        HingeRank(margin=0)


# ------------------------------------------------------------------------------------------------ correlation


def correlations(a: Tensor, b: Tensor, ridge: float) -> Tensor:
    """By inverse square roots, as the paper has it."""
    n, size = a.shape
    a, b = ((x - x.mean(0)) * size**0.5 for x in (a, b))

    def root(x: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(x.T @ x / (n - 1) + ridge * torch.eye(size, dtype=x.dtype))
        return vectors * values.rsqrt() @ vectors.T

    return torch.linalg.svdvals(root(a) @ (a.T @ b / (n - 1)) @ root(b))


def test_correlation() -> None:
    loss = Correlation(ridge=0.01).build(facts({}))
    have = [(True, True)] * 12 + NONE
    batch = seen(have)
    a, b = batch.x["image"], batch.x["text"]
    expected = 1 - correlations(a[:12], b[:12], 0.01).mean()
    got = loss.over_batch(batch)
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-6)
    for x, y in zip(torch.autograd.grad(got, [a, b]), torch.autograd.grad(expected, [a, b]), strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)


def test_correlation_of_too_few() -> None:
    loss = Correlation().build(facts({}))
    expected = "batch: expected more samples than the 8 numbers of an embedding .* got 8"
    with pytest.raises(ValueError, match=expected):
        loss.over_batch(seen([(True, True)] * 8))
    for batch in (seen([(True, True)]), seen([(True, True)] * 8 + NONE), seen([(True, False)] * 9)):
        value = loss.over_batch(batch)
        assert value == 0
        assert all((g == 0).all() for g in torch.autograd.grad(value, list(batch.x.values())))
    loss.after_step()
    assert int(loss.steps) == 0
    with pytest.raises(ValueError, match="ridge: expected a positive number, got 0"):
        Correlation(ridge=0)


def test_the_shared_space_undoes_linear_maps() -> None:
    """Two streams that differ by a linear map alone become alike, which their embeddings are not."""
    a = F.normalize(draw(400, 8), dim=1)
    b = a @ draw(8, 8, seed=5)
    loss = Correlation(ridge=1e-6, decay=0.5).build(facts({}))
    batch = seen([(True, True)] * 400)
    batch.x["image"], batch.x["text"] = a, b
    for _ in range(3):
        assert loss.over_batch(batch) < 1e-3
        loss.after_step()

    def right(x: Tensor, y: Tensor) -> float:
        return ((x @ y.T).argmax(1) == torch.arange(len(x))).double().mean().item()

    assert right(a, F.normalize(b, dim=1)) < 0.1
    assert right(loss.shared("image", a), loss.shared("text", b)) > 0.99
    again = Correlation().build(facts({}))
    assert again.shared("image", a) is a
    again.load_state_dict(loss.state_dict())
    assert right(again.shared("image", a), again.shared("text", b)) > 0.9, "a checkpoint has the maps"


# ------------------------------------------------------------------------------------------------ cycle


def test_cycle() -> None:
    loss = shaken(Cycle(paired=0.25).build(facts({})))
    batch = seen([*SOME, *ALL])
    a, b = batch.x["image"], batch.x["text"]
    present = torch.tensor([*SOME, *ALL])
    both, only_a, only_b = present.all(1), present[:, 0], present[:, 1]

    def u(x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        y = y[rows]
        return (x[rows] - y).square().sum() / (y - y.mean(0)).square().sum()

    there, back = loss.there, loss.back
    pairs = u(there(a), b, both) + u(back(b), a, both)
    cycles = u(back(there(a)), a, only_a) + u(there(back(b)), b, only_b)
    torch.testing.assert_close(loss.over_batch(batch).double(), 0.125 * pairs + 0.375 * cycles, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(loss.shared("image", a), there(a))
    assert loss.shared("text", b) is b
    for few in (NONE, [(True, True)], [(False, False)] * 3):
        value = loss.over_batch(seen(few))
        assert value == 0
    with pytest.raises(ValueError, match="paired: expected a share between 0 and 1, got 2"):
        Cycle(paired=2)


def test_embeddings_that_become_alike_gain_nothing() -> None:
    """Were the loss a mean distance, the encoders would agree on one point."""
    loss = Cycle(paired=1.0).build(facts({})).double()
    batch = seen(ALL)
    before = loss.over_batch(batch)
    point = F.normalize(draw(1, 8, seed=9), dim=1)
    for name in ("image", "text"):
        batch.x[name] = point + 0.01 * batch.x[name].detach()
    assert loss.over_batch(batch) > 0.5 * before


# ------------------------------------------------------------------------------------------------ reconstruct


def test_reconstructed_pixels() -> None:
    loss = shaken(Reconstruct("image").build(facts({"image": Stream(Patches(size=8, layers=1))})))
    pixels = draw(2, 192, seed=3)
    parts: list[Any] = [[Media(Modality.IMAGE, each[None], (1, 1, 1))] for each in pixels]
    packed = PackedBatch.from_samples([parts[0], [], parts[1]])
    batch = seen([(True, False), (False, False), (True, False)], image=packed)
    found = loss.decoder(batch.x["image"][[0, 2]] * 8**0.5)
    torch.testing.assert_close(loss.over_batch(batch).double(), F.mse_loss(found, pixels), atol=1e-5, rtol=1e-5)


def test_reconstructed_words_and_vectors() -> None:
    streams = {"text": Stream(Words(layers=0)), "image": Stream(Frozen(size=3))}
    words = shaken(Reconstruct("text").build(facts(streams)))
    ids = [torch.tensor([3, 5, 3]), torch.zeros(0, dtype=torch.int64), torch.tensor([7])]
    vectors = [draw(2, 3), draw(1, 3, seed=1), torch.zeros(0, 3, dtype=torch.float64)]
    have = [(True, True), (True, False), (False, True)]
    batch = seen(have, text=PackedBatch.from_samples(ids), image=PackedBatch.from_samples(vectors))
    logits = words.decoder(batch.x["text"] * 8**0.5).log_softmax(1)
    expected = -torch.stack([logits[0, ids[0]].mean(), logits[2, 7]]).mean()
    torch.testing.assert_close(words.over_batch(batch).double(), expected, atol=1e-5, rtol=1e-5)
    assert words.chance_loss(batch.batch) == pytest.approx(torch.tensor(40.0).log().item())
    loss = shaken(Reconstruct("image").build(facts(streams)))
    found = loss.decoder(batch.x["image"][:2] * 8**0.5)
    targets = torch.stack([vectors[0].mean(0), vectors[1][0]])
    torch.testing.assert_close(loss.over_batch(batch).double(), F.mse_loss(found, targets), atol=1e-5, rtol=1e-5)


def test_nothing_to_reconstruct() -> None:
    for stream, encoder in (("text", Words()), ("image", Patches())):
        loss = Reconstruct(stream).build(facts({stream: Stream(encoder)}))
        loss.double()
        packed = PackedBatch.from_samples([[]] if stream == "image" else [torch.zeros(0, dtype=torch.int64)])
        assert loss.over_batch(seen([(False, False)], **{stream: packed})) == 0
    with pytest.raises(ValueError, match=r"streams.text.encoder: expected one of images .* got HashedWords"):
        Reconstruct("text").build(facts({"text": Stream(HashedWords())}))
