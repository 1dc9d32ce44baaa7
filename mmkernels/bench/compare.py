"""What became slower from one results file to another, by the ratio to the baseline in the same file.

A ratio is of one moment on one machine, so that it can be compared with another day's; times can not. It still has
noise: that of its rounds, which its file states, and that between two processes, whose memory lies elsewhere and whose
neighbours differ. Most points have not changed between two files, so how far their ratios moved shows the latter.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

__all__ = ["Change", "compare", "main", "render"]

Results = Mapping[str, Any]

BETWEEN, ENOUGH = (0.02, 0.1), 8  # bounds of the noise between processes; of fewer points their mean is taken
EVERY = "all points"
SURE = 3.0  # standard deviations

# Which a reader should know of, though ratios can be compared all the same.
_MACHINE = ("device", "isa", "threads")


@dataclass(frozen=True)
class Change:
    """One of our contenders on one point.

    Args:
        verdict: "slower", "faster", "same", "noise" (more than the threshold, but no more than chance explains), "now
            wrong", "no longer wrong", "new", "gone", or "not comparable" (another baseline, or no ratio in one file).
        before, after: its ratio to the baseline, in each file.
        noise: standard deviation of the logarithm of after / before.
    """

    group: str
    contender: str
    verdict: str
    before: float | None = None
    after: float | None = None
    noise: float | None = None

    @property
    def is_bad(self) -> bool:
        return self.verdict in ("slower", "now wrong", "gone")


def _ours(results: Results) -> dict[tuple[str, str], Mapping[str, Any]]:
    entries = {(each["group"], each["extra_info"]["contender"]): each for each in results["benchmarks"]}
    return {key: each for key, each in entries.items() if each["extra_info"]["role"] == "ours"}


def _wrong(results: Results) -> set[tuple[str, str]]:
    found = results["mmkernels"]["not_timed"]
    return {
        (each["group"], each["contender"])
        for each in found
        if each["kind"] in ("wrong", "fails") and each["contender"].startswith("mmkernels")
    }


def _own_noise(entry: Mapping[str, Any]) -> float:
    """Of a ratio, relative: as its file states it, else from the quartiles of its own rounds; too few tell nothing."""
    stated, stats = entry["extra_info"].get("speedup_noise"), entry["stats"]
    if stated is not None and stats["rounds"] >= 3:
        return float(stated)
    if stats["rounds"] < ENOUGH:
        return math.inf
    spread = (stats["q3"] - stats["q1"]) / 1.349 / stats["median"]  # of a normal distribution
    return 1.2533 * math.sqrt(2) * spread / math.sqrt(stats["rounds"])


def _between(moves: Sequence[float]) -> float:
    """The noise between processes: how far the ratio of a typical point moved from where all did."""
    least, most = BETWEEN
    if len(moves) < ENOUGH:
        return (least + most) / 2
    middle = statistics.median(moves)
    return min(max(1.4826 * statistics.median(abs(move - middle) for move in moves), least), most)


def _of_every(moves: Sequence[float], threshold: float) -> list[Change]:
    """What all points have in common, such as a compiler's flag: a row of its own, from half the threshold on."""
    if len(moves) < ENOUGH:
        return []
    move, noise = statistics.median(moves), 1.2533 * _between(moves) / math.sqrt(len(moves))
    verdict = _verdict(move, noise, threshold / 2)
    return [Change(EVERY, "mmkernels", verdict, 1.0, math.exp(move), noise)] if verdict != "same" else []


def compare(before: Results, after: Results, threshold: float = 0.1) -> list[Change]:
    """Changes of all our contenders that have a ratio, the worst first.

    Args:
        before, after: results of `mmkernels bench --json`.
        threshold: how much slower counts; 0.1 for a tenth.

    Raises:
        ValueError: no point is in both.
    """
    old, new = _ours(before), _ours(after)
    old_wrong, new_wrong = _wrong(before), _wrong(after)
    both = [key for key in old if key in new]
    if not both and not new_wrong and not old_wrong:
        raise ValueError("expected results that have a point in common")
    ratios = {key: (old[key]["extra_info"].get("speedup"), new[key]["extra_info"].get("speedup")) for key in both}
    moves = {key: math.log(b / a) for key, (a, b) in ratios.items() if a and b}
    baselines = {key: [each[key]["extra_info"].get("baseline") for each in (old, new)] for key in both}
    others = {key for key, (a, b) in baselines.items() if a and b and a != b}
    moves = {key: move for key, move in moves.items() if key not in others}
    between = {family: _between(of) for family, of in _by_family(moves).items()}
    changes = _of_every(list(moves.values()), threshold)
    for key, move in moves.items():
        noise = math.hypot(_own_noise(old[key]), _own_noise(new[key]), between[_family(key)])
        changes.append(Change(*key, _verdict(move, noise, threshold), *ratios[key], noise))
    alone = [key for key, (a, b) in ratios.items() if key in others or bool(a) != bool(b)]
    changes += [Change(*key, "not comparable", *ratios[key]) for key in alone]
    changes += [Change(*key, "now wrong") for key in sorted(new_wrong - old_wrong)]
    changes += [Change(*key, "no longer wrong") for key in sorted(old_wrong - new_wrong) if key in new]
    there = {each["group"] for each in after["benchmarks"]}  # a point that was not measured at all is not gone
    changes += [Change(*key, "gone") for key in old if key not in new and key not in new_wrong and key[0] in there]
    changes += [Change(*key, "new") for key in new if key not in old and key not in old_wrong]
    return sorted(changes, key=_rank)


def _family(key: tuple[str, str]) -> str:
    return key[0].partition(":")[0]


def _by_family(moves: Mapping[tuple[str, str], float]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for key, move in moves.items():
        found.setdefault(_family(key), []).append(move)
    return found


def _verdict(move: float, noise: float, threshold: float) -> str:
    if abs(move) <= math.log1p(threshold):
        return "same"
    if abs(move) <= SURE * noise:
        return "noise"
    return "slower" if move < 0 else "faster"


_ORDER = ("now wrong", "gone", "slower", "noise", "not comparable", "faster", "no longer wrong", "new", "same")


def _rank(change: Change) -> tuple[int, float]:
    move = math.log(change.after / change.before) if change.before and change.after else 0.0
    return _ORDER.index(change.verdict), move


def render(changes: Sequence[Change], before: Results, after: Results) -> Iterator[str]:
    """Lines of text: what differs between the machines, what changed, and a count of the rest."""
    machines = [each["machine_info"]["mmkernels"] for each in (before, after)]
    pairs = {name: [each.get(name) for each in machines] for name in _MACHINE}
    pairs["torch"] = [each.get("versions", {}).get("torch") for each in machines]
    pairs["size"] = [each["mmkernels"].get("size") for each in (before, after)]
    for name, (a, b) in pairs.items():
        if a != b:
            yield f"{name}: {a} before, {b} after: ratios of different machines, versions or runs"
    shown = [change for change in changes if change.verdict != "same"]
    rows = [
        [
            change.verdict,
            change.group,
            change.contender,
            *("" if ratio is None else f"{ratio:.2f}x" for ratio in (change.before, change.after)),
            f"{change.after / change.before - 1:+.0%}" if change.before and change.after else "",
            "" if change.noise is None else "anything" if math.isinf(change.noise) else f"{SURE * change.noise:.0%}",
        ]
        for change in shown
    ]
    if rows:
        heads = ["", "point", "contender", "before", "after", "change", "chance explains"]
        yield str(tabulate(rows, heads, disable_numparse=True))
    counts = {verdict: sum(change.verdict == verdict for change in changes) for verdict in _ORDER}
    yield ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)


def _read(path: Path) -> Results:
    try:
        results: Results = json.loads(path.read_text(encoding="utf-8"))
        _ours(results), _wrong(results), results["machine_info"]["mmkernels"]
    except OSError as error:
        raise ValueError(f"{path}: expected a results file, got {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: expected results that mmkernels bench --json wrote, got other content") from None
    return results


def main(before: Path, after: Path, threshold: float = 0.1) -> int:
    """Print what changed; returns 1 if anything is slower or wrong now, 2 if the files are of no use."""
    try:
        old, new = _read(before), _read(after)
        changes = compare(old, new, threshold)
    except ValueError as error:
        print(f"mmkernels bench --compare: {error}", file=sys.stderr)
        return 2
    for line in render(changes, old, new):
        print(line)
    return int(any(change.is_bad for change in changes))
