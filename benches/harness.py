"""The bench: a registry of cases, each checked before it is timed, against what a user would otherwise use.

A bench file lists its cases and calls `main`:

    def setup(p, device):                                   # p is one point of the grid
        x = torch.randn(p["N"], p["E"], dtype=getattr(torch, p["dtype"]), device=device, requires_grad=True)
        return {"x": x}

    def ours(inputs, backend):                              # returns every output and gradient, in a fixed order
        y = mmkernels.something(inputs["x"], backend=backend)
        return y, *torch.autograd.grad(y.sum(), inputs["x"])

    def plain(inputs):                                      # the same in plain PyTorch; in float64 it is the truth
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

Before a contender is timed: (1) at the gate's size our result errs at most 1.5 times plain PyTorch's error against
float64, plus the stated epsilon; (2) at full size every contender agrees with plain PyTorch as far as the dtype allows.
One that fails is reported as wrong and has no time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import tyro
from measure import Timing, Work, ceilings, peak_memory, timings
from report import machine, print_table, save
from torch import Tensor

import mmkernels.testing as testing
from mmkernels.runtime.backends import candidates

__all__ = ["Case", "Options", "Work", "main"]

Params = Mapping[str, Any]
Inputs = dict[str, Any]
Outputs = Sequence[Any]

# Relative root-mean-square distance from plain PyTorch at full size, where float64 truth is too large to form. In half
# precision that is plain PyTorch in float32 on the same values, and twice its own error in half precision is allowed.
# That is 4% of InfoNCE's gradient in bfloat16, N = 1024, and 29% of SigLIP's gradient of the bias, N = 8192.
_AGREEMENT = {"float64": 1e-10, "float32": 1e-4, "float16": 1e-2, "bfloat16": 4e-2}


@dataclass(frozen=True)
class Case:
    """One thing to measure; see the module's example.

    Args:
        name: of the case.
        grid, quick, large: points to measure; each has a "dtype" when the case has tensors.
        setup: `(params, device) -> inputs`, a dict; tensors that need gradients have requires_grad set.
        ours: `(inputs, backend) -> outputs`.
        plain: `(inputs) -> outputs` in plain PyTorch: the baseline, and in float64 the truth.
        others: further contenders, `(inputs) -> outputs`.
        peers: package -> name of its adapter in peers.py.
        work: `(params) -> Work`.
        outputs: what the outputs are called.
        gate: parameters that replace those of the point for the float64 gate; None when the point itself will do.
        terms: `(inputs) -> tensors`: of each output, or of the first few, the sum of its absolute terms, see
            `assert_as_accurate`. Scalars that cancel need it.
        check: replaces both gates: `(contender, outputs, inputs) -> None`, raises AssertionError.
        limits: `(params, contender) -> reason` for not running it (a logit matrix that would not fit), or None.
        baseline: the contender that ratios refer to; of several the fastest.
        family: measure each backend of this family that can serve, not only the one that `backend=None` picks.
        figures: `(outputs, inputs) -> {column: value}`, further figures of a result, such as a plan's efficiency.
    """

    name: str
    grid: Sequence[Params]
    quick: Sequence[Params]
    setup: Callable[[Params, torch.device], Inputs]
    ours: Callable[[Inputs, str | None], Outputs]
    plain: Callable[[Inputs], Outputs] | None = None
    others: Mapping[str, Callable[[Inputs], Outputs]] = field(default_factory=dict)
    peers: Mapping[str, str] = field(default_factory=dict)
    work: Callable[[Params], Work] = lambda _: Work()
    outputs: Sequence[str] = ()
    gate: Params | None = None
    terms: Callable[[Inputs], Outputs] = lambda _inputs: ()
    check: Callable[[str, Outputs, Inputs], None] | None = None
    limits: Callable[[Params, str], str | None] = lambda _params, _name: None
    baseline: str | Sequence[str] = "plain PyTorch"
    large: Sequence[Params] = ()
    family: str | None = None
    figures: Callable[[Outputs, Inputs], Mapping[str, float]] = lambda _outputs, _inputs: {}


@dataclass(frozen=True)
class Options:
    """Options of every bench."""

    quick: bool = False
    """Small sizes: does it run, and is it right?"""
    large: bool = False
    """The large sizes of the benches that have some; choose among them with --filter."""
    backend: tuple[str, ...] = ()
    """Backends of ours to measure, each by name; by default the bench decides: each that can serve, or the one that
    `backend=None` picks."""
    filter: str = ""
    """Only the points whose title contains this text."""
    only: tuple[str, ...] = ()
    """Only these contenders, by name, where the others would take minutes. Ratios need the baseline among them."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to run."""
    threads: int = 0
    """CPU threads; 0 leaves torch's own choice."""
    seconds: float = 2.0
    """Time to spend on each contender, after its warm-up."""
    memory: bool = True
    """Measure peak memory too (on a CPU each contender again, in a process of its own)."""
    peers: bool = True
    """Measure the other packages that are installed."""
    compile: bool = False
    """Measure torch.compile on a CPU too, where it takes long to compile."""
    save: bool = True
    """Write the figures to benches/results/."""


@dataclass
class Row:
    """One contender on one point of the grid."""

    case: str
    params: dict[str, Any]
    contender: str
    timing: Timing | None = None
    peak_bytes: int | None = None
    error_ratio: float | None = None
    ratio: float | None = None
    memory_ratio: float | None = None
    tflops: float | None = None
    gbytes: float | None = None
    mitems: float | None = None
    of_ceiling: float | None = None
    figures: dict[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def title(self) -> str:
        return " ".join([self.case, *(f"{name}={value}" for name, value in self.params.items())])


def _backends(case: Case, options: Options) -> Sequence[str | None]:
    """Backends of ours to measure; None is the one that `backend=None` picks."""
    if options.backend or case.family is None:
        return options.backend or (None,)
    served = candidates(case.family, torch.device(options.device), torch.float32)
    return [name for name, why_not in served.items() if why_not is None]


def _contenders(case: Case, options: Options) -> tuple[dict[str, Callable[[Inputs], Outputs]], dict[str, str]]:
    """Every contender by name, and those that are absent with the reason."""
    runs: dict[str, Callable[[Inputs], Outputs]] = {}
    absent: dict[str, str] = {}
    if case.plain is not None:
        runs["plain PyTorch"] = case.plain
    for name, run in case.others.items():
        if name.startswith("torch.compile") and options.device == "cpu" and not options.compile:
            absent[name] = "skipped on a CPU (--compile)"
        else:
            runs[name] = run
    for backend in _backends(case, options):
        name = f"mmkernels [{backend}]" if backend else "mmkernels"
        runs[name] = lambda inputs, backend=backend: case.ours(inputs, backend)
    if options.peers and case.peers:
        import peers

        for package, adapter in case.peers.items():
            found, why_absent = peers.adapter(package, adapter, options.device)
            if found is None:
                absent[package] = why_absent
            else:
                runs[package] = found
    if options.only:
        unknown = [name for name in options.only if name not in runs]
        if unknown:
            raise SystemExit(f"--only {unknown[0]!r}: no contender of {case.name}; there are {', '.join(runs)}")
        runs, absent = {name: runs[name] for name in options.only}, {}
    return runs, absent


def _converted(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    def convert(value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            return value
        return value.detach().to(dtype).requires_grad_(value.requires_grad)

    return {name: convert(value) for name, value in inputs.items()}


def _gate_against_truth(case: Case, params: Params, options: Options) -> dict[str, float]:
    """Contender of ours -> its largest error ratio at the gate's size. Raises AssertionError when one is too large."""
    if case.check is not None or case.plain is None:
        return {}
    inputs = case.setup({**params, **(case.gate or {})}, torch.device(options.device))
    doubled = _converted(inputs, torch.float64)
    truth, plain, terms = case.plain(doubled), case.plain(inputs), case.terms(doubled)
    ratios = {}
    for name, run in _contenders(case, options)[0].items():
        if not name.startswith("mmkernels"):
            continue
        results = run(inputs)
        assert len(results) == len(truth) == len(case.outputs), f"{case.name}: outputs= must name each of {len(truth)}"
        compared = enumerate(zip(case.outputs, results, plain, truth, strict=True))
        ratios[name] = max(
            testing.assert_as_accurate(f"{name}: {what}", *three, terms=terms[i] if i < len(terms) else None).ratio
            for i, (what, *three) in compared
        )
    return ratios


@dataclass
class _Reference:
    """What every contender's outputs must be, and how far each may be from it."""

    outputs: Outputs
    allowed: list[float]


def _distance(result: Tensor, expected: Tensor) -> float:
    result, expected = result.double(), expected.double()
    both = torch.isfinite(expected)
    return ((result[both] - expected[both]).norm() / expected[both].norm().clamp_min(1e-30)).item()


def _reference(run: Callable[[Inputs], Outputs], results: Outputs, params: Params, inputs: Inputs) -> _Reference:
    """From plain PyTorch and its results, or where its size is beyond it from the next of theirs."""
    agreement = _AGREEMENT[params["dtype"]]
    if params["dtype"] not in ("float16", "bfloat16"):
        return _Reference(results, [agreement] * len(results))
    outputs = run(_converted(inputs, torch.float32))
    return _Reference(outputs, [max(agreement, 2 * _distance(*x)) for x in zip(results, outputs, strict=True)])


def _agrees(case: Case, name: str, results: Outputs, reference: _Reference | None, inputs: Inputs) -> str:
    """Raises AssertionError unless a contender's result is plain PyTorch's, as far as the dtype allows.

    Returns what there is to note: the outputs that a contender does not compute (None).
    """
    if case.check is not None:
        case.check(name, results, inputs)
        return ""
    if reference is None:
        return ""
    missing = []
    for what, result, expected, allowed in zip(
        case.outputs, results, reference.outputs, reference.allowed, strict=True
    ):
        if result is None:
            missing.append(what)
            continue
        distance = _distance(result, expected)
        assert distance <= allowed, f"{what} is {distance:.1e} from plain PyTorch's"
    assert not (missing and name.startswith("mmkernels")), f"does not give {', '.join(missing)}"
    return f"does not give {', '.join(missing)}" if missing else ""


def _memory_in_child(bench: str, case: Case, params: Params, name: str, options: Options) -> int | str:
    """Peak memory of one contender in a fresh process, or why there is no figure."""
    request = {"case": case.name, "params": dict(params), "contender": name, "device": options.device}
    request |= {"threads": torch.get_num_threads(), "backend": options.backend}
    done = subprocess.run(
        [sys.executable, bench, "--measure-memory", json.dumps(request)], capture_output=True, encoding="utf-8"
    )
    if done.returncode != 0:
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return int(done.stdout.strip().splitlines()[-1])


def _measure_memory(cases: Sequence[Case], request: dict[str, Any]) -> None:
    """The child's side: a small warm-up, then one call."""
    torch.set_num_threads(request["threads"])
    case = next(case for case in cases if case.name == request["case"])
    device = torch.device(request["device"])
    options = Options(device=request["device"], backend=tuple(request["backend"]), compile=True)
    run = _contenders(case, options)[0][request["contender"]]
    run(case.setup({**request["params"], **(case.gate or case.quick[0])}, device))
    inputs = case.setup(request["params"], device)
    print(peak_memory(lambda: run(inputs), device))


def _measure(bench: str, case: Case, params: Params, options: Options) -> list[Row]:
    """Every contender on one point: check, time, memory."""
    device = torch.device(options.device)
    runs, absent = _contenders(case, options)
    rows = {name: Row(case.name, dict(params), name) for name in runs}
    for name, ratio in _gate_against_truth(case, params, options).items():
        rows[name].error_ratio = ratio
    inputs = case.setup(params, device)
    reference: _Reference | None = None
    ready = {}
    for name, run in runs.items():
        reason = case.limits(params, name)
        if reason is not None:
            rows[name].note = reason
            continue
        try:
            results = run(inputs)
            if reference is None and case.plain and not case.check and not name.startswith("mmkernels"):
                reference = _reference(run, results, params, inputs)
            rows[name].note = _agrees(case, name, results, reference, inputs)
            rows[name].figures = dict(case.figures(results, inputs))
        except AssertionError as error:
            rows[name].note = f"WRONG, not timed: {error}"
            if name.startswith("mmkernels"):
                raise AssertionError(f"{rows[name].title}: {name}: {error}") from None
        except Exception as error:  # a peer that cannot do this size is a result, not the end of the bench
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
    """Fills what follows from the figures: ratios to the baseline, achieved rates, fractions of the ceiling."""
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
    options = tyro.cli(
        Options, prog=f"bench_{bench}.py", description=f"Measures {bench} against what a user would otherwise use."
    )
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
