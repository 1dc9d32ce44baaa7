"""A point of a case: its contenders checked, then timed in turn.

Before a contender is timed: (1) at the gate's size our error against float64 is at most 1.2 times plain PyTorch's, plus
the stated epsilon; (2) at full size every contender agrees with plain PyTorch to the dtype's tolerance. A contender
that fails is reported as wrong and not timed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from mmkernels.bench.case import Case, Contender, Inputs, Settings, contenders
from mmkernels.bench.checks import Reference, agreement, first_line, gate_against_truth, reference_from
from mmkernels.bench.measure import in_turn
from mmkernels.bench.memory import Request, peak_memory, peak_memory_in_child

__all__ = ["Result", "measured"]


# A call that takes longer than this many times `Settings.seconds` is timed by the call that was checked: elsewhere
# bfloat16 is emulated 25 times slower than float32, and a dense mask is large.
_PATIENCE = 4


@dataclass
class Result:
    """What a contender gave on a point.

    Args:
        kind: "timed", "checked" (right, and not to be timed), "wrong", "fails", "skipped" or "absent".
        why: of the last four.
        seconds: of each round.
    """

    contender: str
    role: str
    kind: str = "checked"
    why: str = ""
    note: str = ""
    seconds: list[float] = field(default_factory=list)
    error_ratio: float | None = None
    peak_bytes: int | None = None
    figures: dict[str, float] = field(default_factory=dict)
    predicted: float | None = None


def measured(
    module: str, case: Case, point: Mapping[str, Any], names: Sequence[str], settings: Settings, *, timed: bool
) -> dict[str, Result]:
    """Results of the contenders of these names, which must be the case's.

    Raises:
        Exception: what setup raises.
    """
    device = torch.device(settings.device)
    known = contenders(case, settings)
    chosen = {name: known[name] for name in known if name in names}
    results = {name: Result(name, contender.role) for name, contender in chosen.items()}
    for name, contender in chosen.items():
        if contender.run is None:
            results[name].kind, results[name].why = "absent", contender.absent
        elif (why := case.limits(point, name)) is not None:
            results[name].kind, results[name].why = "skipped", why
    if case.sample is not None:
        return _sampled(case, point, results, settings)
    able = [contender for name, contender in chosen.items() if results[name].kind == "checked"]
    if not able:
        return results
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # torch.compile gives up after eight compilations of a function
    ours = [contender for contender in able if contender.name.startswith("mmkernels")]
    for name, found in gate_against_truth(case, point, ours, device).items():
        if isinstance(found, str):
            results[name].kind, results[name].why = "wrong", found
        else:
            results[name].error_ratio = max(error.ratio for error in found.values())
    inputs = case.setup(point, device)
    ready, took = _right(case, point, able, inputs, results, settings)
    if not timed:
        return results
    samples = in_turn(
        ready, device, seconds=settings.seconds, least=settings.least, disable_gc=settings.disable_gc, took=took
    )
    for name, seconds in samples.items():
        results[name].kind, results[name].seconds = "timed", seconds
    for result in results.values():
        result.kind = "timed" if result.seconds else result.kind
    if settings.memory and case.memory:
        for name, run in ready.items():
            request = Request(module, case.name, point, name, settings)
            peak = peak_memory(run, device) if device.type == "cuda" else peak_memory_in_child(request)
            if isinstance(peak, str):
                results[name].note = f"memory: {peak}"
            else:
                results[name].peak_bytes = peak
    return results


def _sampled(case: Case, point: Mapping[str, Any], results: dict[str, Result], settings: Settings) -> dict[str, Result]:
    """Of a case that takes its own times."""
    assert case.sample is not None
    able = [name for name, result in results.items() if result.kind == "checked"]
    for name, found in case.sample(point, able, settings).items():
        if isinstance(found, str):
            results[name].kind, results[name].why = "wrong", found
        else:
            results[name].kind, results[name].seconds = "timed", list(found.seconds)
            results[name].figures, results[name].predicted = dict(found.figures), found.predicted
    return results


def _right(
    case: Case,
    point: Mapping[str, Any],
    able: Sequence[Contender],
    inputs: Inputs,
    results: dict[str, Result],
    settings: Settings,
) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """The contenders whose results agree with plain PyTorch's at full size, and the seconds that a call took."""
    ready: dict[str, Callable[[], Any]] = {}
    seconds: dict[str, float] = {}
    reference: Reference | None = None
    only_ours = all(contender.name.startswith("mmkernels") for contender in able)
    if case.plain and not case.check and only_ours and case.limits(point, "plain PyTorch") is None:
        reference = reference_from(case.plain, case.plain(inputs), point, inputs)  # not selected, but needed
    for contender in able:
        name, run, result = contender.name, contender.run, results[contender.name]
        assert run is not None
        if result.kind == "wrong":
            continue
        try:
            outputs, took = _called(run, inputs, settings)
            if took > _PATIENCE * settings.seconds:
                outputs, took = _called(run, inputs, settings)  # the first call may have imported or compiled
            if reference is None and case.plain and not case.check and not name.startswith("mmkernels"):
                reference = reference_from(run, outputs, point, inputs)
            result.note = agreement(case, name, outputs, reference, inputs)
            if reference is None and case.plain and not case.check and name.startswith("mmkernels"):
                result.note = "checked at the gate's size only"
            result.figures = dict(case.figures(outputs, inputs))
        except AssertionError as error:
            result.kind, result.why = "wrong", str(error)
        except Exception as error:  # a peer that fails at this size is a result; the bench continues
            result.kind, result.why = "fails", first_line(error)
        else:
            if took > _PATIENCE * settings.seconds:
                result.seconds, result.note = [took], "one call"
            else:
                ready[name], seconds[name] = partial(run, inputs), took
    return ready, seconds


def _called(run: Callable[[Inputs], Any], inputs: Inputs, settings: Settings) -> tuple[Any, float]:
    """What a call returns, and its seconds."""
    _synchronize(settings)
    begin = time.perf_counter()
    outputs = run(inputs)
    _synchronize(settings)
    return outputs, time.perf_counter() - begin


def _synchronize(settings: Settings) -> None:
    if settings.device.startswith("cuda"):
        torch.cuda.synchronize()
