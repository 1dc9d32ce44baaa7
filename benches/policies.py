"""A recipe with its own weights beside measured ones (`mmkernels/pretrain/policies.py`), or a mixture of data sets
beside measured shares of them (`mmkernels/pretrain/mixing.py`), at equal time.

    python benches/policies.py --recipe vilbert --steps 1500     trains 3 seeds of each, then prints a table
    python benches/policies.py --measured mixing --recipe clip --data emoji::scenes
    python benches/policies.py --measured mixing --recipe clip --data emoji::./shuffled
    python benches/policies.py --table                           the table of the newest results

Equal time: the policies' steps are timed in turn, one of each at a time, in processor time of one thread, which other
processes of the machine do not change; the slower a policy's steps, the fewer it gets. Evaluation does not count. The
learning rate decays to zero over each run's own steps. `./shuffled` is made here: pictures of scenes with the captions
of others, from which nothing can be learned. Results of the same day and processor are added to; runs that
are there already are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from PIL import Image
from studies import RESULTS, measured_on
from tabulate import tabulate

from mmkernels.pretrain import Config, train
from mmkernels.pretrain.data import open_data
from mmkernels.pretrain.run_folder import RunFolder
from mmkernels.pretrain.setup import open_source, tokenizer_for
from mmkernels.pretrain.trainer import Trainer

POLICIES = ("fixed", "grad_norm", "progress")


def config_of(
    args: argparse.Namespace, policy: str, run: Path, more: Mapping[str, Any] | None = None, **changes: Any
) -> Config:
    parts = {"model.width": args.width, "model.embed_dim": args.width, f"{args.measured}.kind": policy}
    quiet = {"eval_every": 0, "checkpoint_every": 0, "tensorboard": False, "threads": 1, "eval_limit": args.limit}
    sizes = {"batch": args.batch, "chunk": args.batch, "steps": args.steps, "data": args.data}
    return Config.of(args.recipe, run=run, parts=parts | (more or {}), **quiet, **{**sizes, **changes})


def seconds_of_steps(args: argparse.Namespace, windows: int = 4) -> dict[str, float]:
    """Processor seconds of a step of each policy: the mean over whole windows, the first left out."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        same: dict[str, Any] = {f"{args.measured}.floor": 1.0}  # all draw the same objectives and data
        configs = {policy: config_of(args, policy, Path(folder) / policy, same) for policy in POLICIES}
        data = open_source(configs["fixed"])
        tokenizer = tokenizer_for(configs["fixed"], data, RunFolder(configs["fixed"]))
        trainers = {policy: Trainer(config, data, tokenizer, torch.device("cpu")) for policy, config in configs.items()}
        every = getattr(trainers["fixed"].recipe, args.measured).every
        seconds, reading = dict.fromkeys(POLICIES, 0.0), 0.0
        for step in range(windows * every):
            for i in range(len(POLICIES)):
                policy = POLICIES[(step + i) % len(POLICIES)]
                trainer, began = trainers[policy], time.process_time()
                batch = next(trainer.loader)
                read = time.process_time()
                trainer.measure()
                trainer.begin()
                trainer.backward(batch)
                trainer.update()
                if step >= every:
                    seconds[policy] += time.process_time() - read
                    reading += read - began if i == 0 else 0.0  # the others find it in a cache
    return {policy: (reading + total) / ((windows - 1) * every) for policy, total in seconds.items()}


def trained(args: argparse.Namespace, policy: str, seed: int, steps: int) -> dict[str, Any]:
    """One run: its last figures, seconds, and weights at the end."""
    with tempfile.TemporaryDirectory() as folder:
        outcome = train(config_of(args, policy, Path(folder) / "run", steps=steps, seed=seed))
        records = outcome.folder.records("step")
        evaluated = outcome.folder.records("eval")
    last = records[len(records) // 2 :]
    names = [name for name in records[-1] if name.endswith(("/weight", "/share"))]
    predicted = [each for each in records if "seconds_predicted" in each]
    return {
        "policy": policy,
        "seed": seed,
        "steps": steps,
        "seconds": round(sum(each["seconds"] for each in records), 1),
        "predicted_of_measured": sum(each["seconds_predicted"] for each in predicted)
        / sum(each["seconds"] for each in predicted),
        "weights": {name.rpartition("/")[0]: fmean(each[name] for each in last) for name in names},
        "figures": {each["split"]: [f for f in each["figures"] if f["headline"]] for each in evaluated},
    }


def shuffled(folder: Path, samples: int = 5000) -> None:
    """Some scenes, each with the caption of another one, as a folder's `data.jsonl`."""
    scenes = open_data("scenes").train
    folder.mkdir()
    with (folder / "data.jsonl").open("w", encoding="utf-8") as lines:
        for i in range(samples):
            Image.fromarray(scenes[i].values["image"]).save(folder / f"{i}.png")
            caption = scenes.peek((i + 1) % samples)["text"].captions[0]
            lines.write(json.dumps({"image": f"{i}.png", "caption": caption}) + "\n")


def table(found: dict[str, Any]) -> str:
    """Of each headline figure the mean over the seeds ± half of their range."""
    values: dict[tuple[str, str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in found["runs"]:
        for split, figures in run["figures"].items():
            for figure in figures:
                better = "%" if figure["percent"] else "" if figure["higher_is_better"] else "↓"
                values[split, figure["name"], better][run["policy"]].append(figure["value"])

    def shown(each: Sequence[float], percent: bool) -> str:
        factor, digits = (100, 1) if percent else (1, 3)
        return f"{factor * fmean(each):.{digits}f} ± {factor * (max(each) - min(each)) / 2:.{digits}f}" if each else ""

    rows = [
        [f"{name} {better}".strip(), split, *(shown(of[policy], better == "%") for policy in POLICIES)]
        for (split, name, better), of in values.items()
    ]
    return str(tabulate(rows, ["figure", "split", *POLICIES], tablefmt="github", disable_numparse=True))


def path_of(about: dict[str, Any]) -> Path:
    device = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    return RESULTS / f"policies-{device}-{about['date'][:10]}.json"


def run_all(args: argparse.Namespace, about: dict[str, Any], path: Path, every: dict[str, Any]) -> None:
    """Train what `every` does not have, and write it."""
    settings = {name: value for name, value in vars(args).items() if name not in ("table", "seeds")}
    found = every.setdefault(
        " on ".join(filter(None, (args.recipe, args.data))), {"about": about, "settings": settings, "runs": []}
    )
    if found["settings"] != settings:
        sys.exit(f"{path}: expected runs with the settings {settings}, got {found['settings']}; remove them")
    if "step_seconds" not in found:
        found["step_seconds"] = seconds_of_steps(args)
    pace = found["step_seconds"]
    print(pace, flush=True)
    for seed in range(args.seeds):
        for policy in POLICIES:
            if not any((run["policy"], run["seed"]) == (policy, seed) for run in found["runs"]):
                steps = round(args.steps * pace["fixed"] / pace[policy])
                found["runs"].append(trained(args, policy, seed, steps))
                print({name: found["runs"][-1][name] for name in ("policy", "seed", "steps", "seconds")}, flush=True)
                path.write_text(json.dumps(every, ensure_ascii=False, indent=1) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", choices=("policy", "mixing"), default="policy", help="weights or shares of data")
    parser.add_argument("--recipe", default="vilbert", help="of several objectives")
    parser.add_argument("--data", help="with --measured mixing: several data sets, A::B")
    parser.add_argument("--steps", type=int, default=1500, help="with fixed weights")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=64, help="of the model and of embeddings")
    parser.add_argument("--batch", type=int, default=32, help="samples of a step")
    parser.add_argument("--limit", type=int, default=256, help="samples of each held-out set")
    parser.add_argument("--table", action="store_true", help="print the newest results, and train nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    about = measured_on()
    path = max(RESULTS.glob("policies-*.json"), key=lambda each: each.name[-15:]) if args.table else path_of(about)
    every = json.loads(path.read_text("utf-8")) if path.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        if args.data is not None and "./shuffled" in args.data.split("::"):
            shuffled(Path("shuffled"))
        if not args.table:
            run_all(args, about, path, every)
    for recipe, found in every.items():
        print(f"\n{recipe}\n\n{table(found)}")


if __name__ == "__main__":
    main()
