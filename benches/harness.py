"""The bench harness: runs cases, checks every contender before timing it, and compares with the alternatives.

A bench file lists its cases and calls `main`:

    def setup(p, device):                                   # p is one point of the grid
        x = torch.randn(p["N"], p["E"], dtype=getattr(torch, p["dtype"]), device=device, requires_grad=True)
        return {"x": x}

    def ours(inputs, backend):                              # returns all outputs and gradients, in a fixed order
        y = mmkernels.something(inputs["x"], backend=backend)
        return y, *torch.autograd.grad(y.sum(), inputs["x"])

    def plain(inputs):                                      # the same in plain PyTorch; in float64 the ground truth
        y = inputs["x"].square().sum(1)
        return y, *torch.autograd.grad(y.sum(), inputs["x"])

    CASES = [
        Case(
            name="something",
            grid=[{"N": 8192, "E": 512, "dtype": "float32"}, {"N": 8192, "E": 512, "dtype": "bfloat16"}],
            quick=[{"N": 1024, "E": 256, "dtype": "float32"}],
            gate={"N": 256},                                # the float64 gate runs at this size
            setup=setup,
            ours=ours,
            plain=plain,
            others={"torch.compile": torch.compile(plain)},
            peers={"open_clip": "clip_loss"},               # peers.py: package -> adapter
            work=lambda p: Work(flops=8 * p["N"] ** 2 * p["E"]),
            outputs=("loss", "grad_x"),
        )
    ]

    if __name__ == "__main__":
        main("something", CASES)

Before a contender is timed: (1) at the gate's size our error against float64 is at most 1.2 times plain PyTorch's, plus
the stated epsilon; (2) at full size every contender agrees with plain PyTorch to the dtype's tolerance. A contender
that fails is reported as wrong and not timed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import tyro
from case import Case, Inputs, Options, Params, Row, contenders
from checks import Reference, agreement, gate_against_truth, reference_from
from measure import Work, ceilings, peak_memory, timings
from report import machine, print_table, save

__all__ = ["Case", "Inputs", "Options", "Work", "main"]


def _memory_in_child(bench: str, case: Case, params: Params, name: str, options: Options) -> int | str:
    """Peak memory of one contender in a fresh process, or the reason why there is none."""
    request = {"case": case.name, "params": dict(params), "contender": name, "device": options.device}
    request |= {"threads": torch.get_num_threads(), "backend": options.backend}
    done = subprocess.run(
        [sys.executable, bench, "--measure-memory", json.dumps(request)], capture_output=True, encoding="utf-8"
    )
    if done.returncode != 0:
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return int(done.stdout.strip().splitlines()[-1])


def _measure_memory(cases: Sequence[Case], request: dict[str, Any]) -> None:
    """In the child process: a small warm-up, then one call."""
    torch.set_num_threads(request["threads"])
    case = next(case for case in cases if case.name == request["case"])
    device = torch.device(request["device"])
    options = Options(device=request["device"], backend=tuple(request["backend"]), compile=True)
    run = contenders(case, options)[0][request["contender"]]
    run(case.setup({**request["params"], **(case.gate or case.quick[0])}, device))
    inputs = case.setup(request["params"], device)
    print(peak_memory(lambda: run(inputs), device))


def _measure(bench: str, case: Case, params: Params, options: Options) -> list[Row]:
    """Check every contender on one point, time it and measure its memory."""
    device = torch.device(options.device)
    runs, absent = contenders(case, options)
    rows = {name: Row(case.name, dict(params), name) for name in runs}
    for name, ratio in gate_against_truth(case, params, options).items():
        rows[name].error_ratio = ratio
    inputs = case.setup(params, device)
    reference: Reference | None = None
    ready = {}
    for name, run in runs.items():
        reason = case.limits(params, name)
        if reason is not None:
            rows[name].note = reason
            continue
        try:
            results = run(inputs)
            if reference is None and case.plain and not case.check and not name.startswith("mmkernels"):
                reference = reference_from(run, results, params, inputs)
            rows[name].note = agreement(case, name, results, reference, inputs)
            rows[name].figures = dict(case.figures(results, inputs))
        except AssertionError as error:
            rows[name].note = f"WRONG, not timed: {error}"
            if name.startswith("mmkernels"):
                raise AssertionError(f"{rows[name].title}: {name}: {error}") from None
        except Exception as error:  # a peer that fails at this size is a result; the bench continues
            if name.startswith("mmkernels"):
                raise
            rows[name].note = f"fails: {type(error).__name__}: {str(error).splitlines()[0][:80]}"
        else:
            ready[name] = lambda run=run: run(inputs)
        results = None
    reference = None
    for name, timing in timings(ready, device, seconds=options.seconds).items():
        rows[name].timing = timing
        if options.memory:
            memory = (
                peak_memory(ready[name], device)
                if device.type == "cuda"
                else _memory_in_child(bench, case, params, name, options)
            )
            if isinstance(memory, int):
                rows[name].peak_bytes = memory
            else:
                rows[name].note = f"memory: {memory}"
    return [*rows.values(), *(Row(case.name, dict(params), name, note=why) for name, why in absent.items())]


def _rates(rows: list[Row], case: Case, params: Params, ceiling: Mapping[str, float]) -> None:
    """Fill in the derived figures: ratios to the baseline, achieved rates, fractions of the ceiling."""
    work = case.work(params)
    names = (case.baseline,) if isinstance(case.baseline, str) else case.baseline
    timed = [row for row in rows if row.contender in names and row.timing is not None]
    base = min(timed, key=lambda row: row.timing.median, default=None)
    for row in rows:
        if base is not None and row.peak_bytes is not None and base.peak_bytes:
            row.memory_ratio = row.peak_bytes / base.peak_bytes
        if row.timing is None:
            continue
        if base is not None and base.timing is not None:
            row.ratio = base.timing.median / row.timing.median
        if work.flops is not None:
            row.tflops = work.flops / row.timing.median / 1e12
            row.of_ceiling = row.tflops * 1e12 / ceiling[f"flops:{params['dtype']}"]
        if work.bytes is not None:
            row.gbytes = work.bytes / row.timing.median / 1e9
            row.of_ceiling = max(row.of_ceiling or 0.0, row.gbytes * 1e9 / ceiling["bytes"])
        if work.items is not None:
            row.mitems = work.items / row.timing.median / 1e6


def main(bench: str, cases: Sequence[Case]) -> None:
    """Run a bench from the command line.

    Raises:
        AssertionError: our own result is wrong.
        SystemExit: no point matches the filter.
    """
    if sys.argv[1:2] == ["--measure-memory"]:
        return _measure_memory(cases, json.loads(sys.argv[2]))
    options = tyro.cli(Options, prog=f"bench_{bench}.py", description=f"Measure {bench} against the alternatives.")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.quick and options.large:
        sys.exit("--quick and --large exclude each other")
    size = "quick" if options.quick else "large" if options.large else "grid"
    points = [(case, params) for case in cases for params in getattr(case, size)]
    points = [(case, params) for case, params in points if options.filter in Row(case.name, dict(params), "").title]
    if not points:
        sys.exit(f"no point among the {size} ones matches --filter {options.filter!r}")
    device = torch.device(options.device)
    dtypes = sorted({params["dtype"] for _, params in points if "dtype" in params})
    seconds = min(options.seconds, 1.0)
    ceiling = ceilings([getattr(torch, name) for name in dtypes], device, torch.get_num_threads(), seconds)
    rows: list[Row] = []
    for case, params in points:
        measured = _measure(sys.argv[0], case, params, options)
        _rates(measured, case, params, ceiling)
        print_table(measured)
        rows += measured
    about = machine(device) | {"ceilings": ceiling, "quick": options.quick, "bench": bench}
    if options.save:
        print(f"written: {save(about, rows)}")
