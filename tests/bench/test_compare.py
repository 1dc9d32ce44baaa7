"""`--compare` finds a kernel that became slower, and nothing where nothing changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench.results import entry, results

pytest.importorskip("tabulate", reason="mmkernels[bench] is not installed")

from mmkernels.bench import compare
from mmkernels.bench.figures import ratio, ratio_noise


def simulated(
    seed: int, slower: Mapping[int, float] | None = None, groups: int = 30, rounds: int = 7
) -> dict[str, Any]:
    """A run of many points: rounds have noise that their pair shares and noise that it does not, one call in twenty is
    disturbed, and each process has a factor of its own for each contender."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(groups):
        shared = rng.lognormal(0, 0.1, rounds)
        times = []
        for factor in (1.0, (slower or {}).get(i, 1.0) / 2.0):
            process = rng.lognormal(0, 0.015)
            own = rng.lognormal(0, 0.03, rounds) * np.where(rng.random(rounds) < 0.05, 1.5, 1.0)
            times.append((0.1 * factor * process * shared * own).tolist())
        base, ours = times
        noise = ratio_noise(base, ours)
        point = {"N": 2**i, "dtype": "float32"}
        found.append(entry("loss", point, "plain PyTorch", "baseline", base, speedup=1.0, speedup_noise=0.0))
        found.append(entry("loss", point, "mmkernels", "ours", ours, speedup=ratio(base, ours), speedup_noise=noise))
    return results(found)


def verdicts(changes: list[compare.Change]) -> dict[str, str]:
    return {change.group: change.verdict for change in changes}


@pytest.mark.parametrize("seed", range(10))
def test_nothing_is_flagged_where_nothing_changed(seed: int) -> None:
    assert not [change for change in compare.compare(simulated(2 * seed), simulated(2 * seed + 1)) if change.is_bad]


@pytest.mark.parametrize("seed", range(10))
def test_a_slower_kernel_is_flagged(seed: int) -> None:
    changed = {3: 1.3, 17: 1.4}
    found = verdicts(compare.compare(simulated(2 * seed), simulated(2 * seed + 1, changed)))
    slower = [group for group, verdict in found.items() if verdict == "slower"]
    assert sorted(slower) == sorted(f"contrastive: loss N={2**i} dtype=float32" for i in changed)


@pytest.mark.parametrize("rounds", [1, 3, 5])
def test_few_rounds_tell_little(rounds: int) -> None:
    for seed in range(10):
        changes = compare.compare(simulated(2 * seed, rounds=rounds), simulated(2 * seed + 1, rounds=rounds))
        assert not [change for change in changes if change.is_bad], seed


def test_what_all_points_have_in_common_is_a_row_of_its_own() -> None:
    """A compiler's flag that was lost: no point alone need be beyond the noise."""
    every = dict.fromkeys(range(30), 1.09)
    (all_points,) = (each for each in compare.compare(simulated(0), simulated(1, every)) if each.group == compare.EVERY)
    assert all_points.verdict == "slower"
    assert all_points.after == pytest.approx(1 / 1.09, rel=0.02)
    assert not any(change.group == compare.EVERY for change in compare.compare(simulated(0), simulated(1)))


def test_ratios_to_different_baselines_are_not_compared() -> None:
    def one(**more: Any) -> dict[str, Any]:
        return results([entry("loss", {"N": 1}, "mmkernels", "ours", [1.0] * 9, speedup_noise=0.01, **more)])

    before = one(speedup=2.0, baseline="plain PyTorch")
    for after in (one(speedup=1.0, baseline="torch.compile"), one()):
        assert [change.verdict for change in compare.compare(before, after)] == ["not comparable"]


def test_ours_that_is_gone_is_bad_where_its_point_is_there() -> None:
    point = {"N": 4}
    base = entry("loss", point, "plain PyTorch", "baseline", [1.0] * 5)
    both = results(
        [
            base,
            entry("loss", point, "mmkernels", "ours", [1.0] * 5, speedup=2.0),
            entry("other", point, "mmkernels", "ours", [1.0] * 5),
        ]
    )
    alone = results([base, entry("other", point, "mmkernels", "ours", [1.0] * 5)])
    assert [(change.verdict, change.is_bad) for change in compare.compare(both, alone)] == [("gone", True)]


def test_an_absolute_time_does_not_count() -> None:
    """A machine at half its speed."""
    before, after = simulated(0), simulated(1)
    for each in after["benchmarks"]:
        for name in ("median", "q1", "q3"):
            each["stats"][name] *= 2
    assert not any(change.is_bad for change in compare.compare(before, after))


def test_a_change_within_the_noise_is_called_so() -> None:
    def one(speedup: float, noise: float) -> dict[str, Any]:
        more = {"speedup": speedup, "speedup_noise": noise}
        return results([entry("loss", {"N": 1}, "mmkernels", "ours", [1.0] * 5, **more)])

    (change,) = compare.compare(one(2.0, 0.1), one(1.6, 0.1))
    assert (change.verdict, change.before, change.after) == ("noise", 2.0, 1.6)
    (change,) = compare.compare(one(2.0, 0.01), one(1.6, 0.01))
    assert change.verdict == "slower"
    (change,) = compare.compare(one(2.0, 0.01), one(1.6, 0.01), threshold=0.3)
    assert change.verdict == "same"
    (change,) = compare.compare(one(2.0, 0.01), one(2.6, 0.01))
    assert change.verdict == "faster"


def test_results_that_became_wrong_are_flagged() -> None:
    point = {"N": 4}
    right = results([entry("loss", point, "mmkernels", "ours", [1.0] * 5, speedup=2.0)])
    group = right["benchmarks"][0]["group"]
    wrong = results(
        [], not_timed=[{"group": group, "contender": "mmkernels", "role": "ours", "kind": "wrong", "why": ""}]
    )
    assert [(change.verdict, change.is_bad) for change in compare.compare(right, wrong)] == [("now wrong", True)]
    assert [change.verdict for change in compare.compare(wrong, right)] == ["no longer wrong"]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = tmp_path / "a.json", tmp_path / "b.json"
    before.write_text(json.dumps(simulated(0)), encoding="utf-8")
    slow = simulated(1, {3: 1.5})
    slow["machine_info"]["mmkernels"] = {**slow["machine_info"]["mmkernels"], "isa": "avx512"}
    after.write_text(json.dumps(slow), encoding="utf-8")
    assert compare.main(before, before) == 0
    assert "30 same" in capsys.readouterr().out
    assert compare.main(before, after) == 1
    out = capsys.readouterr().out
    assert "isa: avx2 before, avx512 after" in out
    assert "slower" in out
    assert "N=8 " in out
    assert compare.main(before, tmp_path / "none.json") == 2
    assert f"{tmp_path / 'none.json'}: expected a results file" in capsys.readouterr().err
    other = tmp_path / "other.json"
    for content in ("[]", "{}", "no JSON", json.dumps({"benchmarks": [{}]})):
        other.write_text(content, encoding="utf-8")
        assert compare.main(before, other) == 2
        assert "expected results that mmkernels bench --json wrote" in capsys.readouterr().err
    other.write_text(json.dumps(results([])), encoding="utf-8")
    assert compare.main(before, other) == 2
    assert "a point in common" in capsys.readouterr().err


def test_noise_of_a_ratio_is_that_of_its_rounds() -> None:
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(300):
        shared = rng.lognormal(0, 0.2, 15)  # a drift of the machine, which pairs share
        base, ours = shared * rng.lognormal(0, 0.02, 15), shared * rng.lognormal(0, 0.02, 15)
        ratios.append(np.median(base / ours))
    stated = ratio_noise(base.tolist(), ours.tolist())
    assert stated is not None
    assert 0.5 < stated / np.std(np.log(ratios)) < 2
    assert ratio_noise([1.0], [1.0]) is None
