"""The bench of the recipes: every row can run, and says no more than its figures do."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHES = Path(__file__).resolve().parents[2] / "benches"
sys.path.insert(0, str(BENCHES))

import recipe_rows  # noqa: E402
import recipes as bench  # noqa: E402

from mmkernels.pretrain.cli import parse  # noqa: E402
from mmkernels.pretrain.recipes import load, names  # noqa: E402
from mmkernels.pretrain.wiring import leaves  # noqa: E402
from mmkernels.runtime import native  # noqa: E402


def test_every_recipe_has_a_row() -> None:
    elsewhere = {"adapters"}  # they need a trained model: see the rows of transfer
    assert {row.recipe for row in bench.ROWS} == set(names()) - elsewhere


@pytest.mark.parametrize(
    "job", [job for job in bench.jobs(bench.ROWS) if job.variant and not (job.seed or job.task)], ids=lambda j: j.name
)
def test_an_ablation_changes_what_it_says(job: bench.Job) -> None:
    """Its options are options of the recipe, and differ from it."""
    ablated = parse(["--recipe", job.recipe, *job.options])
    plain = load(job.recipe)
    changed = {name for name, value in leaves(ablated.wiring()).items() if value != leaves(plain)[name]}
    settings = {"steps", "batch", "without"} & {option.lstrip("-") for option in job.options}
    assert changed or settings
    for name in settings:
        assert getattr(ablated, name) != getattr(parse(["--recipe", job.recipe]), name)


def record(recipe: str, variant: str, seed: int, **figures: float) -> dict[str, Any]:
    rows = [
        {"name": name, "value": value, "chance": 0.1, "percent": True, "higher_is_better": name != "loss"}
        for name, value in figures.items()
    ]
    run = {"recipe": recipe, "task": "", "variant": variant, "seed": seed, "steps": 300}
    return {**run, "parameters": 100, "trainable": 100, "figures": {"A": rows}}


ROW = bench.Row("clip", "recall", ("A", "B"), "blind", ("--batch", "64"), seeds=2, tried="larger ones")


@pytest.mark.parametrize(
    ("mine", "theirs", "holds"),
    [((0.5, 0.6), (0.3, 0.4), True), ((0.5, 0.6), (0.3, 0.55), False), ((0.05, 0.06), (0.01, 0.02), False)],
)
def test_a_row_holds_outside_the_spread_and_above_chance(
    monkeypatch: pytest.MonkeyPatch, mine: tuple[float, ...], theirs: tuple[float, ...], holds: bool
) -> None:
    monkeypatch.setattr(bench, "ROWS", (ROW,))
    records = [record("clip", "", seed, recall=value) for seed, value in enumerate(mine)]
    records += [record("clip", "blind", seed, recall=value) for seed, value in enumerate(theirs)]
    (line,) = bench.lines(records)  # of split A: B was not measured
    assert line.values == mine and line.others == theirs and line.holds == holds
    text = bench.table(records, [{"recipe": "clip", "task": "", "seconds_per_step": 0.5}])
    assert "| 2.5 |" in text, "minutes of 300 steps"
    slow = [{"recipe": "clip", "task": "", "seconds_per_step": 0.6, "cpu_isa": "avx2"}]
    assert "| 3.0 (AVX2) |" in bench.table(records, slow)
    assert ("**not shown: A**" in text) != holds
    assert bench.tried(records) == ("" if holds else "- clip, blind: larger ones.")
    assert f"{50 * sum(mine):.1f} ± {50 * (max(mine) - min(mine)):.1f}" in text


def test_lower_is_better_and_a_model_of_n_grams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "ROWS", (bench.Row("gpt", "loss", ("A",), "bigram model", ()),))
    for ours, holds in ((0.04, True), (0.07, False), (0.2, False)):
        found = [record("gpt", "", 0, **{"loss": ours, "loss of bigrams": 0.06})]
        (line,) = bench.lines(found)
        assert line.others == (0.06,) and line.holds == holds


@pytest.mark.parametrize(("value", "learns", "holds"), [(0.38, 10, True), (0.37, 10, False), (0.38, 11, False)])
def test_adapters_are_judged_by_what_they_reach_and_how_much_learns(
    monkeypatch: pytest.MonkeyPatch, value: float, learns: int, holds: bool
) -> None:
    monkeypatch.setattr(bench, "ROWS", recipe_rows.transferred("mae", "accuracy", ("A",), "groups"))
    found = [record("mae", "", 0, accuracy=0.9)]  # of the run that they begin with
    found.append({**record("mae", "", 0, accuracy=0.4), "task": "groups, fine-tuned"})
    found.append({**record("mae", "from scratch", 0, accuracy=0.39), "task": "groups, fine-tuned"})
    found.append({**record("mae", "", 0, accuracy=value), "task": "groups, adapters", "trainable": learns})
    full, adapters = bench.lines(found)
    assert (full.values, full.others, full.holds) == ((0.4,), (0.39,), True)
    assert (adapters.values, adapters.others, adapters.holds) == ((value,), (0.4,), holds)
    assert f"mae → groups, adapters ({learns:.1f}% of the parameters)" in bench.table(found)


def test_a_fine_tune_begins_with_the_recipes_first_run() -> None:
    every = bench.jobs(recipe_rows.transferred("mae", "accuracy", ("A",), "groups"))
    assert [job.name for job in every[:3]] == ["mae-0", "mae-groups-probe-0", "mae-groups-probe-from-scratch-0"]
    assert len(every) == 1 + 3 * (2 + 2 + 1)
    assert {job.base and job.base.name for job in every[1:]} == {"mae-0"}
    assert every[2].options[-2:] == ("--probe", "--scratch")
    by_stages = bench.jobs(recipe_rows.transferred("mae", "accuracy", ("A",), "groups", unfreeze="head:9,all"))
    changed = [a.name for a, b in zip(every, by_stages, strict=True) if a.options != b.options]
    assert changed == [f"mae-groups-fine-tuned-{seed}" for seed in range(3)]


def test_what_was_learned_before_has_bases_of_its_own() -> None:
    row = bench.Row("uniter", "accuracy", ("A",), "less", ("--steps", "9"), 2, options=("--probe",), task="answers")
    (base, job, less_base, less), again = bench.jobs([dataclasses.replace(row, before=True)])[:4], bench.jobs([row])
    assert job.base == base and less.base == less_base and less_base.name == "uniter-less-0"
    assert (base.options, job.options) == ((), ("--probe",))
    assert (less_base.options, less.options) == (("--steps", "9"), ("--probe",))
    assert [job.base and job.base.name for job in again if job.task] == ["uniter-0"] * 4
    assert {job.base and job.base.seed for job in bench.jobs([dataclasses.replace(row, before=True)])} == {None, 0, 1}


def test_the_record_of_a_fine_tune(tmp_path: Path) -> None:
    """Its log begins with the weights that it was given; the last evaluation counts."""
    own = [{"name": "accuracy", "value": value} for value in (0.1, 0.2)]
    log: list[dict[str, Any]] = [{"kind": "init"}, {"kind": "start", "parameters": 100, "trainable": [4, 8]}]
    log += [{"kind": "step", "seconds": 0.5, "peak_memory": size} for size in (3, 2)]
    log += [{"kind": "eval", "split": "A", "seconds": 1.0, "figures": [figure]} for figure in own]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, log)), "utf-8")
    found = bench.record(bench.Job("mae", "", ("--probe",), 1, "groups"), tmp_path, 2, ["--steps", "2"])
    assert (found["parameters"], found["trainable"], found["steps"], found["seconds"]) == (100, 8, 2, 1.0)
    assert (found["task"], found["peak_memory"], found["figures"]) == ("groups", 3, {"A": [own[1]]})
    assert found["options"] == ["--steps", "2", "--probe"]


def test_the_newest_of_a_run_counts(tmp_path: Path) -> None:
    for date, value in (("2026-01-02", 0.2), ("2026-01-01", 0.1)):
        runs = [record("clip", "", 0, recall=value), record("clip", "", int(value * 10), recall=value)]
        speeds = [{"recipe": "clip", "task": "", "seconds_per_step": value}]
        name = f"recipes-{'abc'[date != '2026-01-02']}-{date}.json"  # by processor, the older one comes last
        (tmp_path / name).write_text(json.dumps({"date": date, "runs": runs, "speeds": speeds}), "utf-8")
    found, speeds = bench.newest(list(tmp_path.glob("*.json")))
    assert [each["seconds_per_step"] for each in speeds] == [0.2]
    assert sorted((each["seed"], each["figures"]["A"][0]["value"]) for each in found) == [(0, 0.2), (1, 0.1), (2, 0.2)]


def test_results_of_a_day_are_added() -> None:
    def results(**values: float) -> dict[str, Any]:
        runs = [record(name[:-1], "", int(name[-1]), recall=value) for name, value in values.items()]
        return {"runs": runs, "speeds": [{"recipe": name[:-1], "task": "", "pace": v} for name, v in values.items()]}

    found = bench.added(results(clip0=0.1, vqa0=0.2), {"date": "new", **results(moco0=0.5, clip1=0.3, vqa0=0.4)})
    assert [(each["recipe"], each["seed"]) for each in found["runs"]] == [
        ("clip", 0),
        ("clip", 1),
        ("vqa", 0),
        ("moco", 0),
    ]
    assert [each["pace"] for each in found["speeds"]] == [0.3, 0.4, 0.5] and found["date"] == "new"
    assert found["runs"][2] == results(vqa0=0.4)["runs"][0]


def test_the_speed_of_a_recipe_is_that_of_its_stages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each counts by its steps."""
    asked: list[tuple[str, ...]] = []

    def train(job: bench.Job, runs: Path, threads: int, options: list[str], folder: Path) -> None:
        asked.append(job.options)
        folder.mkdir()
        steps = [{"kind": "step", "seconds": pace} for pace in [9.0] * 5 + [1.0] * 20 + [9.0] * 5 + [2.0] * 20]
        (folder / "log.jsonl").write_text("\n".join(map(json.dumps, steps)), "utf-8")

    monkeypatch.setattr(bench, "train", train)
    found = bench.speed(bench.Job("flamingo", "", (), 0), tmp_path)
    assert found["seconds_per_step"] == pytest.approx((200 * 1.0 + 1800 * 2.0) / 2000)
    assert asked[0][:4] == ("--stages.stage-0.until", "25", "--steps", "50")
    assert bench.shortened(bench.Job("clip", "", (), 0)) == ([600], ())


def test_the_speed_of_a_schedule_is_that_of_its_parts() -> None:
    def of(*options: str) -> tuple[list[int], tuple[str, ...]]:
        return bench.shortened(bench.Job("albef", "", options, 0, "answers"))

    assert of("--probe") == ([400], ("--probe",))
    assert of("--unfreeze", "all") == ([400], ("--unfreeze", "all"))
    assert of("--unfreeze", "head:100,all", "--x") == ([100, 400], ("--unfreeze", "head:25,all", "--x"))
    assert of("--unfreeze", "a:9,b+c:99,all") == ([9, 99, 400], ("--unfreeze", "a:25,b+c:50,all"))


def test_trains_once(tmp_path: Path) -> None:
    """A recipe and its ablation, a few steps each; what is done is not done again."""
    command = [sys.executable, BENCHES / "recipes.py", "relation", "--runs", tmp_path / "runs", "--threads", "1"]
    command += ["--out", tmp_path / "out.json", "--options", "steps=2", "eval-limit=32"]
    first, second = (subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(2))
    assert "relation-0: " in first.stdout and "relation-words-only-0: " in first.stdout
    assert "relation-0: " not in second.stdout
    found = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert [(each["recipe"], each["variant"]) for each in found["runs"]] == [
        ("relation", ""),
        ("relation", "words only"),
    ]
    other = subprocess.run([*command[:-1], "eval-limit=16"], capture_output=True, text=True)
    assert (
        other.returncode
        and "relation-0: expected a run with the options ['--steps', '2', '--eval-limit', '16'" in other.stderr
    )
    assert "| relation | relation: accuracy, % | held_out / combinations / drawings |" in first.stdout
    fast = [*command[:2], "relation", "--speed", "--runs", tmp_path / "runs", "--out", tmp_path / "speed.json"]
    subprocess.run(fast, check=True, capture_output=True)
    (found_speed,) = json.loads((tmp_path / "speed.json").read_text("utf-8"))["speeds"]
    assert found_speed["recipe"] == "relation" and 0 < found_speed["seconds_per_step"] < 60
    assert found_speed["cpu_isa"] == native.core.build_info()["cpu_isa"]
    (tmp_path / "runs/relation-words-only-0/done.json").unlink()
    finished = [*command[:2], "--finished", "--runs", tmp_path / "runs", "--out", tmp_path / "some.json"]
    subprocess.run(finished, check=True, capture_output=True)
    assert json.loads((tmp_path / "some.json").read_text("utf-8"))["runs"] == found["runs"][:1]
    nothing = subprocess.run([*finished[:4], tmp_path], capture_output=True, text=True)
    assert nothing.returncode == 2 and "--finished: expected runs that have finished in" in nothing.stderr
    bad = subprocess.run([*command[:2], "clap"], capture_output=True, text=True)
    assert bad.returncode == 2 and "recipe: expected some of clip, siglip" in bad.stderr
