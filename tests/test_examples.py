"""Every example runs unmodified in its own process, and prints what its last line promises."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
LAST_LINES = {
    "clip_step.py": "gradients equal those of one pass over the whole batch",
    "gated_cross_attention.py": "the gate has opened: only the tokens that have an image before them have changed",
    "packed_vlm_step.py": "pack",
}


def test_every_example_is_tested_and_listed() -> None:
    files = {path.name for path in EXAMPLES.glob("*.py")}
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert files == set(LAST_LINES)
    assert all(f"[{name}]({name})" in listed for name in files)


@pytest.mark.parametrize("name", sorted(LAST_LINES))
def test_example_runs(name: str) -> None:
    command = [sys.executable, str(EXAMPLES / name)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(LAST_LINES[name])
