"""The loop over several ranks of this machine, by torchrun and gloo: what it must show, as runs of the command.

    python benches/several_ranks.py parity     losses of 1, 2 and 4 ranks (clip: 8), in ddp and fsdp, step by step
    python benches/several_ranks.py kills      ranks killed at random, beside a run that nobody disturbed
    python benches/several_ranks.py balance    how long ranks encode, dealt by work and in turn
    python benches/several_ranks.py overhead   seconds of a step under torchrun with one rank, and without it

Models are small (width 32): processes share this machine's processors, so seconds are no measure of speed. Results of
the same day and processor are added to.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import tyro
from studies import RESULTS, measured_on

from mmkernels import Machine, TrainingStep, plan_scale
from mmkernels.pretrain import checkpoint
from mmkernels.pretrain.run_folder import stored_records

PARITY = ("clip", "siglip", "albef", "uniter", "moco", "caption")
LOSSES = {"clip": "infonce", "siglip": "siglip"}  # those that a plan knows
SMALL = "--model.width 32 --model.heads 2 --model.embed-dim 32"
QUIET = "--no-tensorboard --eval-every 0 --eval-limit 8 --threads 1 --warmup 10"


def command(run: Path, options: str, world: int, *, restarts: int = 0, script: Path | None = None) -> list[str]:
    """One run of `pretrain`; world 0: without torchrun."""
    program = ["-m", "mmkernels.pretrain"] if script is None else [str(script)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    launcher += ["--max-restarts", str(restarts), "--monitor-interval", "0.1"]
    return [sys.executable, *(launcher if world else ()), *program, *options.split(), "--run-folder", str(run)]


def done(run: Path, options: str, world: int, script: Path | None = None) -> list[dict[str, Any]]:
    """The steps of a run."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    whole = command(run, options, world, script=script)
    finished = subprocess.run(whole, env=environment, capture_output=True, text=True)
    if finished.returncode:
        raise SystemExit(f"{' '.join(whole)}\n{finished.stderr[-3000:]}")
    return stored_records(run, "step")


def parity(steps: int = 50, recipes: Sequence[str] = PARITY) -> None:
    """Losses of the same batches on several ranks, beside those of one process.

    Args:
        steps: of each run.
        recipes: to run.
    """
    rows = []
    for recipe in recipes:
        with tempfile.TemporaryDirectory() as folder:
            options = f"--recipe {recipe} {SMALL} {QUIET} --batch 24 --chunk 4 --steps {steps} --checkpoint-every 0"
            one = [record["loss"] for record in done(Path(folder) / "one", options, 0)]
            for world in (1, 2, 4, 8) if recipe == "clip" else (1, 2, 4):
                for parallel in ("ddp", "fsdp"):
                    run = Path(folder) / f"{parallel}-{world}"
                    found = done(run, f"{options} --parallel {parallel}", world)
                    losses = [record["loss"] for record in found]
                    off = [abs(a - b) / abs(b) for a, b in zip(losses, one, strict=True)]
                    rows.append({"recipe": recipe, "ranks": world, "parallel": parallel, "steps": steps})
                    rows[-1] |= {"largest_difference": max(off), "after_10": max(off[:10]), "last_loss": losses[-1]}
                    rows[-1] |= {"received": median(record.get("ranks/received", 0.0) for record in found)}
                    if recipe in LOSSES:
                        parameters = stored_records(run, "start")[0]["parameters"]
                        rows[-1] |= {"planned": planned(recipe, 24 // world, parameters, parallel, world)}
                    print(rows[-1], flush=True)
    save("parity", rows)


def planned(recipe: str, rows: int, parameters: int, parallel: str, world: int) -> int:
    """Bytes that a rank receives in a step by the plan of `mmkernels scale`: of the loss and the gradients. A run has
    further small messages: the roster of the batch, lengths, losses and the pace of all ranks."""
    step = TrainingStep(
        rows=rows,
        width=32,
        parameters=parameters,
        flops=0.0,
        loss=LOSSES[recipe],
        dtype="float32",
        weights="float32",
        reduction=parallel,
        gathers=1,
    )
    (plan,) = plan_scale(step, [world], machine=Machine.of("cpu"))
    return plan.exchanges["all_gather"].received + plan.reduction.received


def kills(count: int = 100, world: int = 2, steps: int = 3500, gap: float = 10.0, seed: int = 0) -> None:
    """Kill random ranks at random moments until the run is done; its weights against those of a run left alone.

    Args:
        count: kills.
        world: ranks.
        steps: of the run; enough for so many kills.
        gap: most seconds between two; a start takes about six.
        seed: of ranks and moments.
    """
    draws = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        options = f"--recipe clip {SMALL} {QUIET} --batch 8 --chunk 3 --steps {steps} --checkpoint-every 10"
        left = Path(folder) / "left"
        done(left, options, world)
        run, began, killed = Path(folder) / "killed", time.monotonic(), 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        whole = command(run, options, world, restarts=10 * count)
        with subprocess.Popen(whole, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as launcher:
            while killed < count and launcher.poll() is None:
                time.sleep(draws.uniform(0, gap))
                found = subprocess.run(
                    ["ps", "--ppid", str(launcher.pid), "-o", "pid="], capture_output=True, text=True
                )
                if ranks := [int(pid) for pid in found.stdout.split()]:
                    os.kill(draws.choice(ranks), signal.SIGKILL)
                    killed += 1
        newest = [checkpoint.latest(each / "checkpoints") for each in (left, run)]
        assert newest[0] is not None and newest[1] is not None
        ours, theirs = (checkpoint.load_weights(each) for each in newest)
        steps_done = [record["step"] for record in stored_records(run, "step")]
        row = {
            "kills": killed,
            "ranks": world,
            "steps": steps,
            "finished": launcher.returncode == 0,
            "each_step_once": steps_done == list(range(1, steps + 1)),
            "bit_identical": ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours),
            "minutes": round((time.monotonic() - began) / 60, 1),
        }
    print(row)
    save("kills", [row])


IN_TURN = """
    import sys
    import numpy as np
    from mmkernels.pretrain import main
    from mmkernels.pretrain.data import dealing

    dealing.deal = lambda costs, ranks: np.arange(len(costs)) % ranks
    sys.exit(main())
"""


def balance(world: int = 4, steps: int = 40) -> None:
    """Texts whose lengths vary widely, dealt to ranks by work, and in turn.

    Args:
        world: ranks.
        steps: of each run.
    """
    draws, rows = np.random.default_rng(0), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lengths = draws.lognormal(5.0, 1.3, 2000).clip(4, 3000).astype(int)
        texts = (" ".join(f"w{word}" for word in draws.integers(0, 300, n)) for n in lengths)
        lines = (json.dumps({"text": text}) for text in texts)
        (folder / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
        script = folder / "in_turn.py"
        script.write_text(textwrap.dedent(IN_TURN), encoding="utf-8")
        options = (
            f"--recipe gpt {SMALL} {QUIET} --data folder:{folder}/texts.jsonl --streams.text.encoder.max-tokens 3000"
        )
        options += f" --tokens 40000 --batch 64 --chunk 64 --steps {steps} --checkpoint-every 0"
        for dealt, patched in (("by work", None), ("in turn", script)):
            found = done(folder / dealt.replace(" ", "-"), options, world, script=patched)[2:]
            imbalance = [record["ranks/imbalance"] for record in found]
            rows.append(
                {"dealt": dealt, "ranks": world, "median": median(imbalance), "mean": float(np.mean(imbalance))}
            )
            print(rows[-1], flush=True)
    save("balance", rows)


def overhead(steps: int = 60, repeats: int = 3) -> None:
    """Seconds of a step with one rank under torchrun, and in a plain process, in turn.

    Args:
        steps: of each run.
        repeats: runs of each.
    """
    seconds: dict[str, list[float]] = {"plain": [], "torchrun": []}
    with tempfile.TemporaryDirectory() as folder:
        options = f"--recipe clip {QUIET} --batch 128 --chunk 64 --steps {steps} --checkpoint-every 0"
        for i in range(repeats):
            for name, world in (("plain", 0), ("torchrun", 1)):
                found = done(Path(folder) / f"{name}-{i}", options, world)[5:]
                seconds[name].append(median(record["seconds"] for record in found))
    best = {name: min(each) for name, each in seconds.items()}
    row = {"seconds": seconds, "ratio": best["torchrun"] / best["plain"]}
    print(row)
    save("overhead", [row])


def save(name: str, rows: list[dict[str, Any]]) -> None:
    """Add to the results of this day and processor."""
    about = measured_on()
    device = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    path = RESULTS / f"several-ranks-{device}-{about['date'][:10]}.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    found[name] = {"about": about, "rows": rows}
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({f.__name__: f for f in (parity, kills, balance, overhead)})
