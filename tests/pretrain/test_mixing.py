"""Measured shares of a mixture: the factors, against an oracle."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from mmkernels.pretrain.blending import blended
from mmkernels.pretrain.mixing import MeasuredMix, Mixing, Taught


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "loss"}, r"mixing.kind: expected one of fixed, ramp, grad_norm, progress, got 'loss'"),
        ({"every": 0}, "mixing.every: expected at least 1, got 0"),
        ({"samples": 0}, "mixing.samples: expected at least 1, got 0"),
        ({"floor": 0.0}, "mixing.floor: expected a share above 0, at most 1, got 0.0"),
        ({"floor": math.nan}, "mixing.floor: expected a share above 0, at most 1, got nan"),
        ({"alpha": -1.0}, "mixing.alpha: expected at least 0, got -1.0"),
        ({"decay": 1.0}, "mixing.decay: expected 0 <= decay < 1, got 1.0"),
    ],
)
def test_bad_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Mixing(**options)


PARTS, OBJECTIVES = ("a", "b", "c"), ("x", "y")


def oracle(mixing: Mixing, losses: np.ndarray, norms: np.ndarray, weights: np.ndarray, usual: np.ndarray) -> np.ndarray:
    """[n + 1, parts]: the shares in each window, from scratch. `losses` [n, parts, objectives], NaN where nothing was
    said; `norms` [n, parts], NaN where they could not be measured; `usual` [parts], the shares if they were fixed."""
    n, parts, _ = losses.shape
    shares = np.tile(usual, (n + 2, 1))  # of windows 0 to n + 1; measurement t is before window t, and sets t + 1
    means, last = np.full(parts, np.nan), np.full(losses.shape[1:], np.nan)
    for t in range(n):
        gains = np.full(parts, np.nan)
        for part in range(parts):
            now, before = losses[t, part], last[part]
            if mixing.kind == "grad_norm":
                gains[part] = np.nan if np.isnan(now).all() else norms[t, part]
            else:
                both = ~np.isnan(now) & ~np.isnan(before)
                if both.any():
                    falls = np.log(before[both] / now[both])
                    gains[part] = max(0.0, np.average(falls, weights=weights[both])) / shares[t - 1, part]
            if not np.isnan(now).all():
                last[part] = now
        means = np.where(np.isnan(means) | np.isnan(gains), gains, mixing.decay * means + (1 - mixing.decay) * gains)
        known = ~np.isnan(means)
        total = usual[known].sum()
        if not known.any() or np.nanmax(means) == 0:
            continue
        product = usual[known] * means[known] ** mixing.alpha
        new = (1 - mixing.floor) * total * product / product.sum() + mixing.floor * usual[known]
        most, bound = 2 * shares[t, known], np.zeros(known.sum(), bool)
        if most.sum() < total:
            most *= total / most.sum()
        while (over := (new > most * (1 + 1e-15)) & ~bound).any():  # what is above the bound goes to the others
            bound |= over
            if not bound.all():
                new[~bound] *= (total - most[bound].sum()) / new[~bound].sum()
            new[bound] = most[bound]
        shares[t + 1, known] = new
    return shares[1 : n + 1]


@pytest.mark.parametrize("kind", ["grad_norm", "progress"])
@pytest.mark.parametrize("silent", [0.0, 0.3])
def test_shares_are_those_of_an_oracle(kind: Any, silent: float) -> None:
    draws, n = np.random.default_rng(11), 30
    mixing = Mixing(kind, every=4, alpha=0.7, decay=0.3, floor=0.1)
    losses, norms = draws.uniform(0.5, 4.0, (n, 3, 2)), 10.0 ** draws.uniform(-2, 2, (n, 3))
    losses[draws.random(losses.shape) < silent] = np.nan
    norms[draws.random(norms.shape) < silent / 2] = np.nan
    usual, weights = np.array([0.5, 0.02, 0.48]), np.array([1.0, 0.3])
    of, measured, found = dict(zip(PARTS, usual.tolist(), strict=True)), MeasuredMix(mixing), np.empty((n, 3))
    for t in range(n):
        assert measured.due(4 * t)
        told = {
            part: Taught(
                {name: float(x) for name, x in zip(OBJECTIVES, losses[t, i], strict=True) if not np.isnan(x)},
                float(norms[t, i]),
            )
            for i, part in enumerate(PARTS)
        }
        measured.see(told, dict(zip(OBJECTIVES, weights.tolist(), strict=True)), of)
        assert not any(measured.due(4 * t + i) for i in range(4))
        for step in range(4 * t, 4 * t + 4):
            measured.count(blended(of, measured.factors(step), mixing.floor))
        found[t] = [*blended(of, measured.factors(4 * t + 4), mixing.floor).values()]
    expected = oracle(mixing, losses, norms, weights, usual)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    np.testing.assert_allclose(found.sum(1), 1.0, rtol=1e-12)
    assert np.ptp(found[5:], 0).max() > 0.3, "they do change"
    assert not silent or (found == usual).any(), "some part could not be measured"


def seen(measured: MeasuredMix, told: dict[str, Taught]) -> dict[str, float]:
    """After a window with equal shares of all."""
    usual = dict.fromkeys(told, 1 / len(told))
    measured.count(usual)
    return measured.see(told, {"x": 1.0}, usual)


def test_what_teaches_most_is_drawn_most() -> None:
    measured = MeasuredMix(Mixing("progress", every=1))
    for window, fast in enumerate((4.0, 2.0, 1.0)):
        seen(measured, {"fast": Taught({"x": fast}), "slow": Taught({"x": 4 - window / 2}), "no": Taught({"x": 4.0})})
    factors = measured.factors(3)
    assert factors["fast"] > factors["slow"] > factors["no"] == 0.0


def test_what_is_drawn_more_does_not_seem_to_teach_more() -> None:
    measured = MeasuredMix(Mixing("progress", every=1, floor=0.1))
    usual = {"a": 0.5, "b": 0.5}
    for loss_a, loss_b in ((1.0, 1.0), (0.9**3, 0.9)):
        gains = measured.see({"a": Taught({"x": loss_a}), "b": Taught({"x": loss_b})}, {"x": 1.0}, usual)
        for step in range(4):
            measured.count({"a": 0.9, "b": 0.1} if step % 2 else {"a": 0.6, "b": 0.4})
    assert gains["a"] == pytest.approx(gains["b"])


def test_a_share_at_most_doubles() -> None:
    """A part of a thousandth, to which a third of the progress is credited that others have made."""
    mixing, usual = Mixing("progress", every=1, floor=0.2), {"tiny": 0.001, "a": 0.5, "b": 0.499}
    measured, shares = MeasuredMix(mixing), [usual] * 2
    for window in range(40):
        measured.see({part: Taught({"x": 0.9**window}) for part in usual}, {"x": 1.0}, usual)
        measured.count(shares[-2])
        shares.append(blended(usual, measured.factors(window + 1), mixing.floor))
        assert math.fsum(shares[-1].values()) == pytest.approx(1.0)
    tiny = [each["tiny"] for each in shares]
    assert max(now / before for before, now in pairwise(tiny)) <= 2 * (1 + 1e-9)
    assert max(tiny) < 0.1 and max(tiny[-9:]) < 1.3 * min(tiny[-9:]), "no bursts, no swings"


def test_what_cannot_be_measured_has_its_usual_share() -> None:
    measured = MeasuredMix(Mixing("grad_norm", every=1, decay=0.0))
    x = {"x": 1.0}
    assert seen(measured, {"a": Taught(x, 2.0), "b": Taught({}, 0.0)}) == {"a": 2.0}
    assert measured.factors(1) == pytest.approx({"a": 1.0})
    assert seen(measured, {"a": Taught(x, 1.0), "b": Taught(x, 3.0)}) == {"a": 1.0, "b": 3.0}
    assert measured.factors(2) == pytest.approx({"a": 0.5, "b": 1.5})
    assert seen(measured, {"a": Taught(x, math.inf), "b": Taught(x, math.nan)}) == {} == measured.factors(3)
    assert seen(measured, {"a": Taught(x, 1.0), "b": Taught(x, 0.0)}) == {"a": 1.0, "b": 0.0}, "it is learned"
    assert measured.factors(4) == pytest.approx({"a": 2.0, "b": 0.0})
    assert seen(measured, {"a": Taught(x, 0.0), "b": Taught(x, 0.0)}) == {"a": 0.0, "b": 0.0}
    assert measured.factors(5) == {"a": 1.0, "b": 1.0}, "neither teaches more"
    with pytest.raises(RuntimeError, match="step: expected one of 4 to 5, got 6"):
        measured.factors(6)
    growing = MeasuredMix(Mixing("progress", every=1))
    for loss in (1.0, 2.0, math.nan, 3.0):
        assert seen(growing, {"a": Taught({"x": loss})}) in ({}, {"a": 0.0})
        json.dumps(growing.state_dict(), allow_nan=False)
    assert growing.factors(4) == {"a": 1.0}


def test_all_ranks_take_the_same_factors_to_the_last_bit() -> None:
    """Those of rank 0: another logarithm would draw other samples."""
    measured = MeasuredMix(Mixing("grad_norm", every=1), lambda values: [value / 2 for value in values])
    seen(measured, {"a": Taught({"x": 1.0}, 1.0), "b": Taught({"x": 1.0}, 3.0)})
    assert measured.factors(1) == pytest.approx({"a": 0.25, "b": 0.75})


def test_its_state_is_json_and_complete() -> None:
    draws = np.random.default_rng(3)
    one, two = MeasuredMix(Mixing("progress", every=3)), MeasuredMix(Mixing("progress", every=3))
    for window in range(8):
        state = json.loads(json.dumps(one.state_dict()))
        two.load_state_dict(state)
        assert two.state_dict() == state
        told = {part: Taught({"x": float(draws.uniform(1, 2))}) for part in PARTS if draws.random() < 0.7}
        usual = dict.fromkeys(PARTS, 1 / 3)
        one.count(usual)
        two.count(usual)
        state = two.state_dict()
        one.see(told, {"x": 1.0}, usual)
        assert state == two.state_dict(), "what is being written does not change"
        two.see(told, {"x": 1.0}, usual)
        assert one.factors(3 * window + 3) == two.factors(3 * window + 3)
