"""What is measured: a `Case`, its contenders, and the `Settings` of a run."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch

from mmkernels.bench import peers
from mmkernels.runtime.backends import candidates

__all__ = [
    "FAMILIES",
    "Case",
    "Contender",
    "Settings",
    "Work",
    "cases_of",
    "compiled",
    "contenders",
    "points_of",
    "title",
]

FAMILIES = ("attention", "contrastive", "packing", "planner", "scaling", "ranks", "pretrain")

Params = Mapping[str, Any]
Inputs = dict[str, Any]
Outputs = Sequence[Any]
Run = Callable[[Inputs], Outputs]


@dataclass(frozen=True)
class Settings:
    """Of a run of the suite.

    Args:
        full: sizes of trainers instead of those that take seconds; on a GPU also those that only a GPU holds.
        device: where to run.
        backends: our backends to measure, by name, of cases that have them; () for what each measures by default.
        peers: measure other installed packages, too.
        compile: measure torch.compile and FlexAttention, which compile for tens of seconds on a CPU.
        memory: measure peak memory.
        threads: of a CPU; 0 for torch's default.
        seconds: to spend on each contender of a point.
        least: rounds of each contender, whatever they take (3 of one whose first call takes longer than `seconds`).
        disable_gc: time with Python's garbage collector off.
    """

    full: bool = False
    device: str = "cpu"
    backends: tuple[str, ...] = ()
    peers: bool = False
    compile: bool = False
    memory: bool = True
    threads: int = 0
    seconds: float = 1.0
    least: int = 5
    disable_gc: bool = False


@dataclass(frozen=True)
class Work:
    """The work of one call, independent of the algorithm: floating-point operations, bytes moved, items handled."""

    flops: float | None = None
    bytes: float | None = None
    items: float | None = None


@dataclass(frozen=True)
class Sample:
    """What a contender gave that took its own times: seconds of each round, figures, and seconds by the cost model."""

    seconds: Sequence[float]
    figures: Mapping[str, float]
    predicted: float | None = None


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Args:
        name: the case's name.
        quick, full, large: points to measure; each has a "dtype" when the case has tensors. `large` is measured with
            `full` on a GPU.
        setup: `(params, device) -> inputs`, a dict; tensors that need gradients have requires_grad set.
        ours: `(inputs, backend) -> outputs`: all outputs and gradients, in a fixed order.
        plain: `(inputs) -> outputs` in plain PyTorch: the baseline, and in float64 the ground truth.
        others: more contenders, `(inputs) -> outputs`.
        peers: package -> name of its adapter in peers.py.
        work: `(params) -> Work`.
        outputs: names of the outputs.
        gate: parameters that override the point's in the float64 gate; None to use the point's own.
        draws: how many inputs the gate judges together, from `setup` with p["seed"] = 0, 1, ... A scalar's error in one
            draw is chance, and so is its ratio to plain PyTorch's: it is 30 where that happens to be almost exact.
        terms: `(inputs) -> tensors`: the sum of absolute terms of each output, or of the first few, see
            `assert_as_accurate`. Needed for scalars with cancellation.
        check: replaces both gates: `(contender, outputs, inputs) -> None`, raises AssertionError.
        limits: `(params, contender) -> reason` for skipping it (such as a logit matrix that would not fit), or None.
        baseline: the contenders that ratios refer to, the fastest of them: every form that a user could write in plain
            PyTorch; () if there is no ratio of interest.
        backends: whether `ours` takes a backend.
        backends_of: with `full`, measure every backend of this op family that has kernels for the device, not only the
            one that `backend=None` picks.
        compiled: contenders that `Settings.compile` leaves out on a CPU, besides "torch.compile".
        figures: `(outputs, inputs) -> {column: value}`, more figures of a result, such as a plan's efficiency.
        curve: the parameter that is the x axis, for cases that show how time grows.
        calibrate: one or two short points from which the cost model predicts the others' seconds, see prediction.py.
        sample: for cases whose calls are not of this process: takes the place of setup, ours, plain and both gates;
            `(params, contenders, settings) -> {contender: Sample, or what is wrong}`.
        memory: whether peak memory tells anything.
    """

    name: str
    quick: Sequence[Params]
    full: Sequence[Params]
    setup: Callable[[Params, torch.device], Inputs]
    ours: Callable[[Inputs, str | None], Outputs]
    plain: Run | None = None
    others: Mapping[str, Run] = field(default_factory=dict)
    peers: Mapping[str, str] = field(default_factory=dict)
    work: Callable[[Params], Work] = lambda _: Work()
    outputs: Sequence[str] = ()
    gate: Params | None = None
    draws: int = 1
    terms: Callable[[Inputs], Outputs] = lambda _inputs: ()
    check: Callable[[str, Outputs, Inputs], None] | None = None
    limits: Callable[[Params, str], str | None] = lambda _params, _name: None
    baseline: Sequence[str] = ("plain PyTorch", "torch.compile")
    large: Sequence[Params] = ()
    backends: bool = True
    backends_of: str | None = None
    compiled: Sequence[str] = ("torch.compile",)
    figures: Callable[[Outputs, Inputs], Mapping[str, float]] = lambda _outputs, _inputs: {}
    curve: str | None = None
    calibrate: Sequence[Params] = ()
    sample: Callable[[Params, Sequence[str], Settings], Mapping[str, Sample | str]] | None = None
    memory: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.baseline, str):
            raise TypeError(f"baseline: expected a sequence of names, got {self.baseline!r}")


@dataclass(frozen=True)
class Contender:
    """One way to compute a case: `run`, or why it is not there."""

    name: str
    role: str  # ours, baseline, other, peer
    run: Run | None = None
    absent: str = ""


def compiled(call: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile at the first call, since compiling imports what takes seconds."""
    made = cache(partial(torch.compile, call, dynamic=False))
    return lambda *args: made()(*args)


def title(case: Case, point: Params) -> str:
    return " ".join([case.name, *(f"{name}={value}" for name, value in point.items())])


def cases_of(module: str, settings: Settings) -> dict[str, Case]:
    """The cases of a module such as `mmkernels.bench.cases.attention`, by name."""
    cases: Sequence[Case] = importlib.import_module(module).cases(settings)
    found = {case.name: case for case in cases}
    if len(found) != len(cases):
        raise ValueError(f"{module}: expected cases of different names, got {', '.join(case.name for case in cases)}")
    return found


def points_of(case: Case, settings: Settings) -> Sequence[Params]:
    if not settings.full:
        return case.quick
    return [*case.full, *(case.large if settings.device.startswith("cuda") else ())]


def _backends(case: Case, settings: Settings) -> Sequence[str | None]:
    """Our backends to measure; None is the one that `backend=None` picks."""
    if not case.backends:
        return (None,)
    if settings.backends or case.backends_of is None or not settings.full:
        return settings.backends or (None,)
    device = torch.device(settings.device)
    left_out = {"reference"} | ({"triton"} if device.type == "cpu" else set())  # slow, and an interpreter
    served = candidates(case.backends_of, device, torch.float32)
    found = [name for name, why_not in served.items() if why_not is None and name not in left_out]
    return found if len(found) > 1 else (None,)


def _ours(case: Case, backend: str | None, inputs: Inputs) -> Outputs:
    return case.ours(inputs, backend)


def contenders(case: Case, settings: Settings) -> dict[str, Contender]:
    """All contenders of a case by name, plain PyTorch first."""
    runs = {"plain PyTorch": case.plain} if case.plain is not None else {}
    found = {}
    for name, run in {**runs, **case.others}.items():
        role = "baseline" if name in case.baseline else "ours" if name.startswith("mmkernels") else "other"
        if name in case.compiled and settings.device == "cpu" and not settings.compile:
            found[name] = Contender(name, role, absent="not on a CPU without --compile")
        else:
            found[name] = Contender(name, role, run)
    for backend in _backends(case, settings) if case.sample is None else ():
        name = f"mmkernels [{backend}]" if backend else "mmkernels"
        role = "other" if backend == "reference" else "ours"
        found[name] = Contender(name, role, partial(_ours, case, backend))
    for package, adapter in case.peers.items() if settings.peers else ():
        call, why = peers.adapter(package, adapter, settings.device)
        found[package] = Contender(package, "baseline" if package in case.baseline else "peer", call, why)
    return found
