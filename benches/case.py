"""A bench's `Case`s and `Options`, and the contenders and `Row`s that the harness derives from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from measure import Timing, Work

from mmkernels.runtime.backends import candidates

Params = Mapping[str, Any]
Inputs = dict[str, Any]
Outputs = Sequence[Any]


@dataclass(frozen=True)
class Case:
    """One thing to measure; see the example in harness.py.

    Args:
        name: the case's name.
        grid, quick, large: points to measure; each has a "dtype" when the case has tensors.
        setup: `(params, device) -> inputs`, a dict; tensors that need gradients have requires_grad set.
        ours: `(inputs, backend) -> outputs`.
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
        baseline: the contender that ratios refer to; if several, the fastest.
        family: measure every available backend of this family, not only the one that `backend=None` picks.
        figures: `(outputs, inputs) -> {column: value}`, more figures of a result, such as a plan's efficiency.
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
    draws: int = 1
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
    """Small sizes: check that everything runs and is right."""
    large: bool = False
    """Large sizes, for benches that have them; select with --filter."""
    backend: tuple[str, ...] = ()
    """Our backends to measure, by name. Default: all available ones or `backend=None`, depending on the bench."""
    filter: str = ""
    """Only points whose title contains this text."""
    only: tuple[str, ...] = ()
    """Only these contenders, by name, for example to skip slow ones. Ratios need the baseline among them."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to run."""
    threads: int = 0
    """CPU threads; 0: torch's default."""
    seconds: float = 2.0
    """Seconds to spend on each contender after warm-up."""
    memory: bool = True
    """Measure peak memory too (on a CPU in a separate process per contender)."""
    peers: bool = True
    """Measure other installed packages too."""
    compile: bool = False
    """Measure torch.compile on a CPU too, where compilation is slow."""
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
    """Our backends to measure; None is the one that `backend=None` picks."""
    if options.backend or case.family is None:
        return options.backend or (None,)
    served = candidates(case.family, torch.device(options.device), torch.float32)
    return [name for name, why_not in served.items() if why_not is None]


def contenders(case: Case, options: Options) -> tuple[dict[str, Callable[[Inputs], Outputs]], dict[str, str]]:
    """All contenders by name, and the absent ones with the reason."""
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
