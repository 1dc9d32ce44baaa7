"""Errors of our ops and of plain PyTorch in the same dtype, both against float64, at the sizes of the suite's gate.

    python benches/accuracy.py          a minute; writes benches/results/accuracy-<device>-<isa>-<date>.json

An error is the root mean square of the differences over that of the truth. `scripts/write_accuracy.py` makes the table
of docs/numerics.md from the newest file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

import torch
from studies import measured_on, results_of

from mmkernels.bench.case import Case, Settings, cases_of, contenders
from mmkernels.bench.checks import gate_against_truth

FAMILIES = ("attention", "contrastive", "packing")
DTYPES = ("float32", "bfloat16", "float16")


def cases(family: str) -> Iterator[Case]:
    """Those with a backward pass and a ground truth; results that are copies have no error."""
    for case in cases_of(f"mmkernels.bench.cases.{family}", Settings()).values():
        if case.plain is not None and case.check is None and case.name.endswith("fwd+bwd"):
            yield case


def dtypes(case: Case) -> tuple[str, ...]:
    """Half precision where the case has it: equal values of a maximum, for example, have several right gradients."""
    measured = {point["dtype"] for point in (*case.quick, *case.full, *case.large)}
    return DTYPES if "bfloat16" in measured else DTYPES[:1]


def errors(case: Case, dtype: str) -> dict[str, tuple[float, float]]:
    """Output -> our relative error, and plain PyTorch's.

    Raises:
        AssertionError: ours is larger than the gate allows.
    """
    contender = contenders(case, Settings())["mmkernels"]
    point = {**case.full[0], "dtype": dtype}
    found = gate_against_truth(case, point, [contender], torch.device("cpu"))["mmkernels"]
    assert not isinstance(found, str), found
    scales = {name: each.truth_rms or 1.0 for name, each in found.items()}
    return {name: (each.rms / scales[name], each.plain_rms / scales[name]) for name, each in found.items()}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows: list[dict[str, Any]] = []
    for family in FAMILIES:
        for case in cases(family):
            for dtype in dtypes(case):
                found = errors(case, dtype)
                rows.append({"family": family, "case": case.name, "dtype": dtype, "errors": found})
                pairs = (f"{name} {mine:.1e} / {plain:.1e}" for name, (mine, plain) in found.items())
                print(f"{case.name}, {dtype}: {', '.join(pairs)}")
    about = measured_on()
    results_of("accuracy", about).write_text(
        json.dumps({"about": about, "rows": rows}, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
