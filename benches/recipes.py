"""Every recipe beside its ablation, and what is fine-tuned from it: trains all, and writes the figures that each must
show (`recipe_rows.py`).

    python benches/recipes.py                       all of them, one after another; hours
    python benches/recipes.py clip vqa --jobs 2     some, two at a time
    python benches/recipes.py --speed               seconds per step of each, one after another
    python benches/recipes.py --finished            writes the results of what has finished, and trains nothing
    python benches/recipes.py --table               the newest figures of all results as a table

A run that has finished is not repeated, and an interrupted one continues: folders are kept under --runs. Results of
the same day and processor are added to. Figures are those of the last evaluation on the test splits. Settings were
chosen on validation splits (`--validate`). Minutes are those of a run's steps, data included, at the speed that --speed
has found: the median of 20 steps of each stage on all processors, which should have nothing else to do.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import operator
import os
import platform
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import fmean, median
from threading import Lock
from typing import Any

import torch
from recipe_rows import ROWS, Row

from mmkernels.pretrain.config import Config
from mmkernels.pretrain.finetune import STEPS
from mmkernels.pretrain.recipes import load
from mmkernels.runtime import native

RESULTS = Path(__file__).parent / "results"
SHORT = 25  # steps of each stage that --speed takes


@dataclass(frozen=True)
class Job:
    """One run."""

    recipe: str
    variant: str  # "" for the recipe itself
    options: tuple[str, ...]
    seed: int
    task: str = ""
    base: Job | None = None  # the run to begin with

    @property
    def name(self) -> str:
        parts = (self.recipe, self.task, self.variant, str(self.seed))
        return "-".join(part.replace(",", "").replace(" ", "-") for part in parts if part)


def jobs(rows: Sequence[Row]) -> list[Job]:
    """The recipes and their ablations, each once."""
    found: dict[str, Job] = {}
    for row in rows:
        for seed in range(row.seeds):
            for variant, changes in (("", row.alone), (row.ablation, row.changes)):
                if not variant or changes:
                    job = job_of(row, variant, changes, seed)
                    found |= {each.name: each for each in (job.base, job) if each is not None}
    return list(found.values())


def job_of(row: Row, variant: str, changes: tuple[str, ...], seed: int) -> Job:
    """Fine-tunes begin with the recipe's first run, those that compare what was learned before with one of their own
    seed and variant."""
    if not row.task:
        return Job(row.recipe, variant, (*row.options, *changes), seed)
    if row.before:
        return Job(row.recipe, variant, row.options, seed, row.task, Job(row.recipe, variant, changes, seed))
    return Job(row.recipe, variant, (*row.options, *changes), seed, row.task, Job(row.recipe, "", (), 0))


_RUNNING: dict[str, Lock] = defaultdict(Lock)  # two jobs at a time may need the same base


def run(job: Job, runs: Path, threads: int, options: Sequence[str]) -> dict[str, Any]:
    """Train, unless that is done; the record of the run."""
    folder = runs / job.name
    done = folder / "done.json"
    with _RUNNING[job.name]:
        if done.exists():
            have, wanted = json.loads(done.read_text("utf-8"))["options"], [*options, *job.options]
            if have != wanted:
                raise SystemExit(f"{folder}: expected a run with the options {wanted}, got one with {have}; remove it")
        else:
            train(job, runs, threads, options, folder)
            done.write_text(json.dumps(record(job, folder, threads, options), ensure_ascii=False, indent=1), "utf-8")
            print(f"{job.name}: {json.loads(done.read_text('utf-8'))['seconds']:.0f} s", flush=True)
    return json.loads(done.read_text("utf-8"))  # type: ignore[no-any-return]


def train(job: Job, runs: Path, threads: int, options: Sequence[str], folder: Path) -> None:
    command = [sys.executable, "-m", "mmkernels.cli"]
    if job.base is None:
        command += ["pretrain", "--recipe", job.recipe]
    else:
        run(job.base, runs, threads, options)
        command += ["finetune", "--from", str(runs / job.base.name)]
    command += ["--run", str(folder), "--seed", str(job.seed), "--threads", str(threads)]
    command += ["--eval-every", "0", "--no-tensorboard", *options, *job.options]
    if (folder / "checkpoints").exists():
        command.append("--resume")
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment)
    if finished.returncode:
        raise SystemExit(f"{job.name}: {' '.join(command)}\n{finished.stderr[-2000:]}")


def record(job: Job, folder: Path, threads: int, options: Sequence[str]) -> dict[str, Any]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]
    steps = [each for each in records if each["kind"] == "step"]
    start = next(each for each in records if each["kind"] == "start")
    figures = {each["split"]: each["figures"] for each in records if each["kind"] == "eval"}  # the last ones
    return {
        "recipe": job.recipe,
        "task": job.task,
        "variant": job.variant,
        "seed": job.seed,
        "options": [*options, *job.options],
        "threads": threads,
        "parameters": start["parameters"],
        "trainable": max(start["trainable"]),
        "steps": len(steps),
        "seconds": round(sum(each["seconds"] for each in steps), 1),
        "evaluation_seconds": round(max(each["seconds"] for each in records if each["kind"] == "eval"), 1),
        "peak_memory": max(each["peak_memory"] for each in steps),
        "figures": figures,
    }


def measured(record: dict[str, Any], name: str, split: str) -> dict[str, Any] | None:
    return next((each for each in record["figures"].get(split, ()) if each["name"] == name), None)


def speed(job: Job, runs: Path) -> dict[str, Any]:
    """Seconds per step of a recipe, or of what is fine-tuned from one, on all processors: the mean over its stages, of
    which each has its own."""
    ends, short = shortened(job)
    short = (*short, "--steps", str(len(ends) * SHORT), "--eval-limit", "2", "--checkpoint-every", "0")
    with tempfile.TemporaryDirectory() as folder:
        quick = dataclasses.replace(job, options=short)
        train(quick, runs, len(os.sched_getaffinity(0)), [], Path(folder) / "run")
        log = (Path(folder) / "run/log.jsonl").read_text("utf-8")
    seconds = [each["seconds"] for each in map(json.loads, log.splitlines()) if each["kind"] == "step"]
    paces = [median(seconds[i : i + SHORT][-20:]) for i in range(0, len(seconds), SHORT)]
    steps = [end - start for start, end in itertools.pairwise([0, *ends])]
    pace = sum(map(operator.mul, paces, steps)) / sum(steps)
    print(f"{job.name}: {pace:.3f} s", flush=True)
    isa = native.core.build_info()["cpu_isa"]
    return {"recipe": job.recipe, "task": job.task, "seconds_per_step": pace, "cpu_isa": isa}


def shortened(job: Job) -> tuple[list[int], tuple[str, ...]]:
    """(the step at which each stage ends, the options of the job with `SHORT` steps of each)."""
    if not job.task:
        config = Config.of(job.recipe)
        ends = [config.steps if stage.until is None else stage.until for stage in load(job.recipe).stages]
        untils = ((f"--stages.stage-{i}.until", str((i + 1) * SHORT)) for i in range(len(ends) - 1))
        return ends, (*job.options, *itertools.chain.from_iterable(untils))
    options = list(job.options)
    if "--unfreeze" not in options:
        return [STEPS], job.options
    place = options.index("--unfreeze") + 1
    parts, steps = zip(*(item.split(":") for item in f"{options[place]}:{STEPS}".split(",")), strict=True)
    quick = [f"{part}:{(i + 1) * SHORT}" for i, part in enumerate(parts[:-1])]
    options[place] = ",".join([*quick, parts[-1]])
    return list(map(int, steps)), tuple(options)


@dataclass(frozen=True)
class Line:
    """A row of the table, of one split."""

    row: Row
    split: str
    values: tuple[float, ...]  # of the seeds
    others: tuple[float, ...]  # of the ablation
    chance: float
    percent: bool
    higher: bool
    minutes: float  # NaN: its speed is not known
    isa: str  # with which these were measured; empty: not noted
    learns: float  # share of the parameters

    @property
    def holds(self) -> bool:
        """Better than chance and than the ablation; with several seeds, by more than they spread."""
        if self.row.like:
            return fmean(self.values) >= 0.95 * fmean(self.others) and self.learns <= 0.1
        sign = 1 if self.higher else -1
        mine, theirs = ([sign * value for value in values] for values in (self.values, self.others))
        return min(mine) > sign * self.chance and min(mine) > max(theirs)


def lines(records: Sequence[dict[str, Any]], speeds: Sequence[dict[str, Any]] = ()) -> Iterator[Line]:
    """The rows of which every run is there."""
    pace = {(each["recipe"], each["task"]): each for each in speeds}
    for row in ROWS:
        own = [each for each in records if (each["recipe"], each["task"]) == (row.recipe, row.task)]
        mine = sorted((each for each in own if not each["variant"]), key=lambda each: each["seed"])[: row.seeds]
        theirs = [each for each in own if each["variant"] == row.ablation] if row.changes else mine
        if row.like:
            theirs = [each for each in records if (each["recipe"], each["task"]) == (row.recipe, row.like)]
            theirs = [each for each in theirs if not each["variant"]]
        for split in row.splits:
            values = [found for each in mine if (found := measured(each, row.figure, split))]
            same = not row.changes and not row.like
            name = row.ablated or row.figure + (" of bigrams" if same else "")
            others = [found for each in theirs if (found := measured(each, name, split))]
            if values and others:
                first, fast = values[0], pace.get((row.recipe, row.task), {})
                yield Line(
                    row,
                    split,
                    tuple(each["value"] for each in values),
                    tuple(each["value"] for each in others),
                    math.nan if first["chance"] is None else fmean(each["chance"] for each in values),
                    first["percent"],
                    first["higher_is_better"],
                    mine[0]["steps"] * fast.get("seconds_per_step", math.nan) / 60,
                    fast.get("cpu_isa", ""),
                    max(each["trainable"] / each["parameters"] for each in mine),
                )


def table(records: Sequence[dict[str, Any]], speeds: Sequence[dict[str, Any]] = ()) -> str:
    """A Markdown table, a row for each recipe; several seeds are a mean ± half of their range."""
    rows = ["| recipe | figure | of | value | chance | ablation | its value | minutes | |", "|---" * 9 + "|"]
    for row, found in itertools.groupby(lines(records, speeds), lambda line: line.row):
        group = list(found)
        first, seeds = group[0], min(min(len(line.values), len(line.others)) for line in group)
        failed = [line.split for line in group if not line.holds]
        cells = (
            row.title + (f" ({first.learns:.1%} of the parameters)" if row.like else ""),
            row.figure + (", %" if first.percent else "") + ("" if first.higher else " ↓"),
            " / ".join(line.split for line in group),
            " / ".join(shown(line, line.values) for line in group),
            " / ".join(shown(line, [line.chance]) for line in group),
            row.ablation,
            " / ".join(shown(line, line.others) for line in group),
            "" if math.isnan(first.minutes) else f"{first.minutes:.1f}" + " (AVX2)" * (first.isa == "avx2"),
            "; ".join(
                [f"**not shown: {', '.join(failed)}**"] * bool(failed)
                + [f"{seeds} of {row.seeds} seeds"] * (seeds < row.seeds)
            ),
        )
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def tried(records: Sequence[dict[str, Any]]) -> str:
    """A Markdown list: what was tried for the rows that are not shown."""
    failed = dict.fromkeys(line.row for line in lines(records) if not line.holds)
    return "\n".join(f"- {row.title}, {row.ablation}: {row.tried or 'nothing yet'}." for row in failed)


def shown(line: Line, values: Sequence[float]) -> str:
    factor, digits = (100, 1) if line.percent else (1, 2)
    spread = f" ± {factor * (max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{factor * fmean(values):.{digits}f}{spread}"


def newest(paths: Sequence[Path]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The runs and speeds of all result files; of the same one the latest day's."""
    runs, speeds = {}, {}
    files = [json.loads(path.read_text("utf-8")) for path in sorted(paths)]
    for found in sorted(files, key=lambda each: each["date"]):
        runs |= {(each["recipe"], each["task"], each["variant"], each["seed"]): each for each in found["runs"]}
        speeds |= {(each["recipe"], each["task"]): each for each in found["speeds"]}
    return list(runs.values()), list(speeds.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(dict.fromkeys(row.recipe for row in ROWS))
    parser.add_argument("recipes", nargs="*", metavar="recipe", help="default: all")
    parser.add_argument("--runs", type=Path, default=Path("runs/recipes"), help="where run folders are kept")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=0, help="of each run; 0: the processors divided by --jobs")
    parser.add_argument("--options", nargs="*", default=[], help="further ones of every run, such as steps=20")
    parser.add_argument("--out", type=Path, help="file of the results; default: benches/results/recipes-CPU-DATE.json")
    parser.add_argument(
        "--speed", action="store_true", help="only how fast each is; fine-tunes need their finished base"
    )
    parser.add_argument("--finished", action="store_true", help="only those that have finished: train none")
    parser.add_argument("--table", action="store_true", help="print the table of the results there are, and train none")
    args = parser.parse_args()
    if unknown := [name for name in args.recipes if name not in names]:
        parser.error(f"recipe: expected some of {', '.join(names)}, got {', '.join(unknown)}")
    if args.table:
        every, pace = newest(list(RESULTS.glob("recipes-*.json")))
        print(f"{table(every, pace)}\n\n{tried(every)}")
        return
    args.runs.mkdir(parents=True, exist_ok=True)
    chosen = jobs([row for row in ROWS if not args.recipes or row.recipe in args.recipes])
    records, speeds = [], []
    if args.speed:
        speeds = [speed(job, args.runs) for job in chosen if not (job.variant or job.seed)]
    else:
        records = trained(chosen, args, parser)
    cpu = "-".join(cpu_name().lower().split()[:3])
    out = args.out or RESULTS / f"recipes-{'speed-' * args.speed}{cpu}-{date.today()}.json"
    environment = {"cpu": cpu_name(), "processors": len(os.sched_getaffinity(0)), "torch": torch.__version__}
    found = {"date": str(date.today()), "environment": environment, "runs": records, "speeds": speeds}
    if out.exists():
        found = added(json.loads(out.read_text("utf-8")), found)
    out.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", "utf-8")
    print(table(records))
    print(f"results: {out}")


def added(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The results of a day with further ones, which replace those of the same run and stand beside those of the same
    recipe."""
    found = {**new}
    for what, names in (("runs", ("recipe", "task", "variant", "seed")), ("speeds", ("recipe", "task"))):
        rows = list(old[what])
        for row in new[what]:
            same = [i for i, each in enumerate(rows) if all(each[name] == row[name] for name in names)]
            near = [i for i, each in enumerate(rows) if (each["recipe"], each["task"]) == (row["recipe"], row["task"])]
            place = same[0] if same else near[-1] + 1 if near else len(rows)
            rows[place : place + len(same)] = [row]
        found[what] = rows
    return found


def trained(chosen: Sequence[Job], args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[dict[str, Any]]:
    """The records of jobs, of which some may be done already."""
    threads = args.threads or max(1, len(os.sched_getaffinity(0)) // args.jobs)
    options = [part for each in args.options for part in (f"--{each.partition('=')[0]}", each.partition("=")[2])]
    chosen = [job for job in chosen if not args.finished or (args.runs / job.name / "done.json").exists()]
    if not chosen:
        parser.error(f"--finished: expected runs that have finished in {args.runs}, got none")
    if args.finished:
        return [json.loads((args.runs / job.name / "done.json").read_text("utf-8")) for job in chosen]
    with ThreadPoolExecutor(args.jobs) as pool:
        return list(pool.map(lambda job: run(job, args.runs, threads, options), chosen))


def cpu_name() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.processor() or "cpu"


if __name__ == "__main__":
    main()
