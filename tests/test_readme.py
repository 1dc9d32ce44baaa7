"""The README's Python blocks run unmodified, each in a fresh namespace."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_there_is_an_example_of_each_family() -> None:
    for name in ("attention", "infonce", "GradCache", "plan_packing", "segment_pool"):
        assert any(re.search(rf"\b{name}\(", block) for block in BLOCKS), name


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: re.search(r"from mmkernels import (.*)", block)[1])
def test_example_runs(block: str) -> None:
    exec(compile(block, str(README), "exec"), {"__name__": "readme"})
