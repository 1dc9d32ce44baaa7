"""The bench times only correct results, and its figures mean what they say."""

import io
import json
import runpy
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

BENCHES = Path(__file__).resolve().parents[2] / "benches"
pytest.importorskip("tabulate", reason="mmkernels[bench] is not installed")
sys.path.insert(0, str(BENCHES))

import measure  # noqa: E402
import report  # noqa: E402

BENCH = """
import sys
sys.path.insert(0, {benches!r})
import torch
import report
from pathlib import Path
from harness import Case, Work, main

report.RESULTS = Path(sys.argv[0]).parent / "results"

def setup(p, device):
    return {{"x": torch.randn(p["N"], 8, dtype=getattr(torch, p["dtype"]), device=device, requires_grad=True)}}

def plain(inputs):
    y = inputs["x"].square().sum()
    return y, *torch.autograd.grad(y, inputs["x"])

def ours(inputs, backend):
    y, dx = plain(inputs)
    return y, dx * {factor}

CASES = [
    Case(
        name="square",
        grid=[{{"N": 64, "dtype": "float32"}}, {{"N": 64, "dtype": "bfloat16"}}],
        quick=[{{"N": 16, "dtype": "float32"}}],
        setup=setup, ours=ours, plain=plain,
        others={{"wrong": lambda inputs: (inputs["x"].sum(), inputs["x"]), "broken": lambda inputs: 1 / 0,
                "limited": plain, "partial": lambda inputs: (plain(inputs)[0], None)}},
        work=lambda p: Work(flops=16 * p["N"], bytes=64 * p["N"]),
        limits=lambda p, name: "too large for it" if name == "limited" else None,
        figures=lambda outputs, inputs: {{"answer": 42.0}},
        outputs=("y", "dx"),
    )
]
main("square", CASES)
"""


def written_bench(folder: Path, factor: float = 1.0) -> Path:
    script = folder / "bench_square.py"
    script.write_text(BENCH.format(benches=str(BENCHES), factor=factor), encoding="utf-8")
    return script


RunBench = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def run_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunBench:
    """Runs a bench as its own process would, in this one, which has already imported what takes seconds."""
    monkeypatch.setattr(report, "RESULTS", report.RESULTS)  # the bench sets it
    monkeypatch.setattr(sys, "path", [*sys.path])
    threads = torch.get_num_threads()

    def run(*arguments: str, factor: float = 1.0) -> subprocess.CompletedProcess:
        script = str(written_bench(tmp_path, factor))
        code: int | str = 0
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            try:
                runpy.run_path(script, run_name="__main__")
            except SystemExit as stopped:
                code = stopped.code or 0
                if isinstance(code, str):  # as the interpreter does with a message
                    print(code, file=sys.stderr)
                    code = 1
            except Exception:
                code = 1
                traceback.print_exc()
            finally:
                torch.set_num_threads(threads)
        return subprocess.CompletedProcess(sys.argv, code, out.getvalue(), err.getvalue())

    return run


def test_bench_checks_times_and_writes(tmp_path: Path) -> None:
    script = written_bench(tmp_path)
    command = [sys.executable, script, "--quick", "--seconds", "0.01"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (written,) = (tmp_path / "results").glob("square-*-quick.json")
    result = json.loads(written.read_text(encoding="utf-8"))
    (run,) = result["runs"]
    assert {"date", "commit", "device", "versions", "threads", "ceilings"} <= set(run)
    assert {row["run"] for row in result["rows"]} == {0}
    rows = {row["contender"]: row for row in result["rows"]}
    assert rows["plain PyTorch"]["ratio"] == 1.0
    assert rows["mmkernels"]["timing"]["median"] > 0
    assert rows["mmkernels"]["peak_bytes"] is not None
    assert rows["mmkernels"]["tflops"] == pytest.approx(16 * 16 / rows["mmkernels"]["timing"]["median"] / 1e12)
    assert rows["wrong"]["timing"] is None
    assert rows["wrong"]["note"].startswith("WRONG, not timed")
    assert "ZeroDivisionError" in rows["broken"]["note"]
    assert rows["limited"]["note"] == "too large for it"
    assert rows["limited"]["timing"] is None
    assert rows["partial"]["note"] == "does not give dx"
    assert rows["partial"]["timing"] is not None
    assert rows["mmkernels"]["figures"] == {"answer": 42.0}
    assert "mmkernels" in done.stdout


def test_runs_of_a_day_are_joined(run_bench: RunBench, tmp_path: Path) -> None:
    def written(*arguments: str) -> dict:
        done = run_bench("--seconds", "0.01", "--no-memory", *arguments)
        assert done.returncode == 0, done.stderr
        (file,) = (tmp_path / "results").glob("square-*")
        return json.loads(file.read_text(encoding="utf-8"))

    def runs_of(result: dict, dtype: str) -> set[int]:
        return {row["run"] for row in result["rows"] if row["params"]["dtype"] == dtype}

    first = written("--filter", "float32")
    both = written("--filter", "bfloat16")
    assert len(both["runs"]) == 2
    assert runs_of(both, "float32") == {0}
    assert runs_of(both, "bfloat16") == {1}
    assert [row for row in both["rows"] if row["run"] == 0] == first["rows"]
    again = written("--filter", "float32", "--threads", "1")  # its rows replace those of the first run
    assert len(again["rows"]) == len(both["rows"])
    assert [run["threads"] for run in again["runs"]] == [both["runs"][1]["threads"], 1]
    assert runs_of(again, "bfloat16") == {0}
    assert runs_of(again, "float32") == {1}


def test_an_older_file_of_one_run_is_joined_too(run_bench: RunBench, tmp_path: Path) -> None:
    assert run_bench("--filter", "float32", "--seconds", "0.01", "--no-memory").returncode == 0
    (file,) = (tmp_path / "results").glob("square-*")
    result = json.loads(file.read_text(encoding="utf-8"))
    rows = [{name: value for name, value in row.items() if name != "run"} for row in result["rows"]]
    file.write_text(json.dumps(result["runs"][0] | {"rows": rows}), encoding="utf-8")
    assert run_bench("--filter", "bfloat16", "--seconds", "0.01", "--no-memory").returncode == 0
    joined = json.loads(file.read_text(encoding="utf-8"))
    assert len(joined["runs"]) == 2
    assert [row for row in joined["rows"] if row["run"] == 0] == result["rows"]


def test_only_some_contenders(run_bench: RunBench, tmp_path: Path) -> None:
    done = run_bench("--quick", "--seconds", "0.01", "--no-memory", "--only", "mmkernels")
    assert done.returncode == 0, done.stderr
    (written,) = (tmp_path / "results").glob("square-*")
    rows = json.loads(written.read_text(encoding="utf-8"))["rows"]
    assert {row["contender"] for row in rows} == {"mmkernels"}
    assert all(row["timing"] is not None and row["ratio"] is None for row in rows)
    done = run_bench("--quick", "--seconds", "0.01", "--only", "FlexAttention")
    assert done.returncode != 0
    assert "--only 'FlexAttention': no contender of square; there are plain PyTorch, " in done.stderr


def test_own_wrong_result_stops_the_bench(run_bench: RunBench, tmp_path: Path) -> None:
    done = run_bench("--quick", "--seconds", "0.01", factor=1.001)
    assert done.returncode != 0
    assert "AssertionError: mmkernels: dx" in done.stderr
    assert not (tmp_path / "results").exists()


def test_filter_without_a_match_is_an_error(run_bench: RunBench) -> None:
    done = run_bench("--filter", "N=65")
    assert done.returncode != 0
    assert "matches --filter 'N=65'" in done.stderr


def test_peak_memory_sees_what_a_call_allocates() -> None:
    script = f"""
import sys; sys.path.insert(0, {str(BENCHES)!r})
import torch, measure
def run():
    big = torch.ones(64 * 2**20, dtype=torch.uint8)
    return big[:1].clone()
print(measure.peak_memory(run, torch.device("cpu")))
"""
    peak = int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    assert 60 * 2**20 < peak < 80 * 2**20


@pytest.mark.parametrize(("seconds", "repeats"), [(0.2, 5), (0.75, 7), (0.05, 3)])
def test_timings_take_turns(seconds, repeats, monkeypatch) -> None:
    """Calls of .1 s each: at least five, as many as time allows, three if one takes too long."""

    def tenth(run) -> float:
        run()
        return 0.1

    monkeypatch.setattr(measure, "_Clock", lambda device: tenth)
    calls = []
    runs = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    result = measure.timings(runs, torch.device("cpu"), seconds=seconds, least=5)
    assert calls[4:] == list("ab") * repeats  # after a warm-up and a first timing of each
    assert all(timing.repeats == repeats for timing in result.values())


@pytest.mark.parametrize(
    ("rate", "sizes"), [(1e9, [256, 512]), (1e10, [256, 512, 1024]), (1e12, [256, 512, 1024, 2048])]
)
def test_ceiling_keeps_within_its_time(rate, sizes, monkeypatch) -> None:
    """The sizes that are tried on a machine of this many FLOP/s."""
    tried = []

    def timings(runs, device, *, seconds):
        (run,) = runs.values()
        tried.append(len(run()))
        return {"mm": measure.Timing(0.0, 2 * tried[-1] ** 3 / rate, 0.0, 5)}

    monkeypatch.setattr(measure, "timings", timings)
    assert measure.matmul_peak(torch.float32, torch.device("cpu"), 2.0) == pytest.approx(rate)
    assert tried == sizes
