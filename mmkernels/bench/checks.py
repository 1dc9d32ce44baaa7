"""The checks that a contender passes before it is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmkernels import testing
from mmkernels.bench.case import Case, Contender, Inputs, Outputs, Params

# Allowed relative RMS distance from plain PyTorch at full size, where float64 does not fit. In half precision the
# reference is plain PyTorch in float32 on the same values, and twice its own half-precision error is allowed if that is
# more: 4% of InfoNCE's gradient in bfloat16, N = 1024, and 29% of SigLIP's gradient of the bias, N = 8192.
_AGREEMENT = {"float64": 1e-10, "float32": 1e-4, "float16": 1e-2, "bfloat16": 4e-2}


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}"


def _converted(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    def convert(value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            return value
        return value.detach().to(dtype).requires_grad_(value.requires_grad)

    return {name: convert(value) for name, value in inputs.items()}


def _together(draws: list[Outputs]) -> list[Tensor]:
    """Each output of all draws."""
    return [torch.stack(of) for of in zip(*draws, strict=True)]


Errors = dict[str, testing.Accuracy]  # output -> its errors


def gate_against_truth(
    case: Case, point: Params, ours: list[Contender], device: torch.device
) -> dict[str, Errors | str]:
    """Contenders of ours -> the errors of its outputs at the gate's size, or what is wrong."""
    if case.check is not None or case.plain is None or not ours:
        return {}
    runs = {contender.name: contender.run for contender in ours if contender.run is not None}
    results: dict[str, list[Outputs]] = {name: [] for name in ("truth", "plain", "terms", *runs)}
    raised: dict[str, str] = {}
    for seed in range(case.draws):
        drawn = {**point, **(case.gate or {}), **({"seed": seed} if case.draws > 1 else {})}
        inputs = case.setup(drawn, device)
        doubled = _converted(inputs, torch.float64)
        for name, run in {"truth": case.plain, "terms": case.terms}.items():
            results[name].append(run(doubled))
        results["plain"].append(case.plain(inputs))
        for name, run in runs.items():
            try:
                results[name].append(run(inputs))
            except Exception as error:  # the other contenders go on
                raised[name] = first_line(error)
    for name in raised:
        results.pop(name)
    truth, plain, terms = (_together(results.pop(name)) for name in ("truth", "plain", "terms"))
    judged = {name: _judged(case, name, _together(drawn), plain, truth, terms) for name, drawn in results.items()}
    return {**judged, **raised}


def _judged(
    case: Case, name: str, ours: list[Tensor], plain: list[Tensor], truth: list[Tensor], terms: list[Tensor]
) -> Errors | str:
    assert len(ours) == len(truth) == len(case.outputs), f"{case.name}: outputs= must name each of {len(truth)}"
    compared = enumerate(zip(case.outputs, ours, plain, truth, strict=True))
    try:
        return {
            what: testing.assert_as_accurate(f"{name}: {what}", *three, terms=terms[i] if i < len(terms) else None)
            for i, (what, *three) in compared
        }
    except AssertionError as error:
        return str(error)


@dataclass
class Reference:
    """The expected outputs, and the allowed distance of each."""

    outputs: Outputs
    allowed: list[float]


def _distance(result: Tensor, expected: Tensor) -> float:
    result, expected = result.double(), expected.double()
    both = torch.isfinite(expected)
    return ((result[both] - expected[both]).norm() / expected[both].norm().clamp_min(1e-30)).item()


def reference_from(run: Callable[[Inputs], Outputs], results: Outputs, point: Params, inputs: Inputs) -> Reference:
    """The reference from plain PyTorch's results or, where it cannot run, from the next contender's."""
    agreement = _AGREEMENT[point["dtype"]]
    if point["dtype"] not in ("float16", "bfloat16"):
        return Reference(results, [agreement] * len(results))
    outputs = run(_converted(inputs, torch.float32))
    return Reference(outputs, [max(agreement, 2 * _distance(*x)) for x in zip(results, outputs, strict=True)])


def agreement(case: Case, name: str, results: Outputs, reference: Reference | None, inputs: Inputs) -> str:
    """Raise AssertionError unless a contender agrees with plain PyTorch to the dtype's tolerance.

    Returns a note: the outputs that a contender does not compute (None).
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
