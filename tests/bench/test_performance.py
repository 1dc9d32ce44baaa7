"""The figures of the README and of the pages on performance and accuracy are those of the results files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import write_performance as written  # noqa: E402


@pytest.mark.parametrize("script", ["write_performance.py", "write_accuracy.py"])
def test_pages_are_what_the_script_writes(script: str) -> None:
    done = subprocess.run([sys.executable, ROOT / "scripts" / script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_figure_that_drifts_is_noticed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    every = json.loads(json.dumps(written.newest(written.RESULTS)))
    for entry in every[0]["benchmarks"]:
        if entry["extra_info"]["role"] == "ours":
            entry["stats"]["median"] *= 2
            entry["extra_info"]["speedup"] = entry["extra_info"].get("speedup", 0) / 2
    monkeypatch.setattr(written, "newest", lambda folder: every)
    monkeypatch.setattr(sys, "argv", ["write_performance.py", "--check"])
    assert written.main() == 1
    assert capsys.readouterr().err.splitlines() == [
        f"{name} is not what scripts/write_performance.py writes" for name in ("performance.md", "README.md")
    ]


def test_of_each_machine_the_newest_full_results_count(tmp_path: Path) -> None:
    def write(name: str, isa: str, size: str, day: str) -> None:
        about = {"device": "A CPU", "isa": isa, "date": day}
        results = {"machine_info": {"mmkernels": about}, "mmkernels": {"size": size}}
        (tmp_path / f"suite-{name}-{day}.json").write_text(json.dumps(results), encoding="utf-8")

    write("b", "avx2", "full", "2026-01-02")
    write("a", "avx2", "full", "2026-01-03")
    write("c", "avx2", "quick", "2026-01-04")
    write("z", "avx512", "full", "2026-01-01")
    found = [results["machine_info"]["mmkernels"] for results in written.newest(tmp_path)]
    assert [(about["isa"], about["date"]) for about in found] == [("avx2", "2026-01-03"), ("avx512", "2026-01-01")]
