from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pretrain.small_model import Samples, built, collated, gradients, recipe

from mmkernels.pretrain.encoders import Patches
from mmkernels.pretrain.objectives import NtXent
from mmkernels.pretrain.recipe import Recipe, Stream
from mmkernels.pretrain.views import RandomCrop


def two_views() -> Recipe:
    encoder = Patches(layers=1, size=16, patch=8, stem="linear")
    return recipe(
        streams={
            "a": Stream(encoder, field="image", views=(RandomCrop(salt=1),), project="mlp"),
            "b": Stream(encoder, field="image", views=(RandomCrop(salt=2),), project="mlp", tied="a"),
        },
        objectives={"views": NtXent("a", "b", temperature=0.2)},
    )


def pictures(n: int, missing: tuple[int, ...] = ()) -> Samples:
    random = np.random.default_rng(1)
    rows = [{"image": random.integers(0, 256, (16, 16, 3), np.uint8)} for _ in range(n)]
    # Concepts that agree must change nothing.
    return Samples([{} if i in missing else row for i, row in enumerate(rows)], concepts=[0] * n)


def by_hand(a: torch.Tensor, b: torch.Tensor, temperature: float) -> torch.Tensor:
    """The formula of the paper, pair by pair."""
    views = torch.cat([a, b])
    n, total = len(a), torch.zeros((), dtype=views.dtype)
    for i in range(2 * n):
        others = [k for k in range(2 * n) if k != i]
        similar = torch.stack([F.cosine_similarity(views[i], views[k], dim=0) / temperature for k in others])
        total = total + torch.logsumexp(similar, 0) - similar[others.index((i + n) % (2 * n))]
    return total / (2 * n)


@pytest.mark.parametrize("missing", [(), (1,)])
def test_against_the_formula(missing: tuple[int, ...]) -> None:
    of, source = two_views(), pictures(5, missing)
    model, batch = built(of, source), collated(of, source)
    rows = [model.encoder(name)(batch[name]) for name in ("a", "b")]
    kept = [i for i in range(5) if i not in missing]
    expected = by_hand(rows[0][kept], rows[1][kept], 0.2)
    found = model.objectives["views"].over_batch(model.seen(batch, tuple(rows)))
    torch.testing.assert_close(found, expected)


def test_the_two_views_differ_and_share_their_encoder() -> None:
    of, source = two_views(), pictures(3)
    model, batch = built(of, source), collated(of, source)
    a, b = (batch[name].media[1].values for name in ("a", "b"))
    assert not torch.equal(a, b) and model.encoder("a") is model.encoder("b")


def test_gradients_do_not_depend_on_the_chunk() -> None:
    of, source = two_views(), pictures(5, missing=(4,))
    model, batch = built(of, source), collated(of, source)
    loss, whole = gradients(model, batch, 5)
    assert set(whole) == {name for name, _ in model.named_parameters()}
    for chunk in (1, 3):
        again, parts = gradients(model, batch, chunk)
        torch.testing.assert_close(again, loss)
        for name, gradient in whole.items():
            torch.testing.assert_close(parts[name], gradient, msg=name)


def test_a_batch_without_images_costs_nothing() -> None:
    of, source = two_views(), pictures(2, missing=(0, 1))
    model, batch = built(of, source), collated(of, source)
    loss, _ = gradients(model, batch, 2)
    assert loss == 0 and model.objectives["views"].chance_loss(batch) is None


def test_chance() -> None:
    of, source = two_views(), pictures(5, missing=(0,))
    model, batch = built(of, source), collated(of, source)
    assert model.objectives["views"].chance_loss(batch) == pytest.approx(math.log(7))


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="temperature"):
        NtXent(temperature=0.0)
    of = recipe(streams=two_views().streams, objectives={"views": NtXent("a", "a")})
    with pytest.raises(ValueError, match="two streams"):
        built(of, pictures(1))
