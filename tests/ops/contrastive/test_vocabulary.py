"""Definitions repeated in Python and C++ agree."""

import re
from pathlib import Path

from mmkernels.ops.contrastive import types

HEADER = Path(__file__).resolve().parents[3] / "csrc/contrastive/contrastive.h"


def test_lines_of_the_statistics() -> None:
    (enum,) = re.findall(r"enum Statistic \{(.*?)\};", HEADER.read_text(encoding="utf-8"), re.S)
    *lines, count, coefficients = (name.strip() for name in enum.split(","))
    assert [getattr(types, line.removeprefix("k").upper()) for line in lines] == list(range(types.STATISTICS))
    assert count == "kStatistics"
    assert coefficients == f"kCoefficients = {lines[types.COEFFICIENTS]}"
