"""The suite times only correct results, and its figures mean what they say."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="mmkernels[bench] is not installed")

from mmkernels.bench import cli, measure, memory, plugin
from mmkernels.bench.case import FAMILIES, Case, Settings, cases_of, contenders, points_of
from mmkernels.bench.group import measured

HERE = Path(__file__).parent
BENCH = "from mmkernels.bench.suite import benches_of\n\nbench_square = benches_of('toy_cases')\n"

Results = dict[str, Any]
Run = Callable[..., tuple[int, Results, str]]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pytest inside these tests is no worker of xdist, in which pytest-benchmark times nothing, and does not change how
    the process that runs them allocates."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setattr(plugin, "keep_freed_memory", lambda: False)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs the toy bench by pytest in this process: its exit status, results and output."""
    monkeypatch.syspath_prepend(HERE)
    file = tmp_path / "bench_square.py"
    file.write_text(BENCH, encoding="utf-8")

    def run(*arguments: str) -> tuple[int, Results, str]:
        results = tmp_path / "results.json"
        given = f"{file} -p mmkernels.bench.plugin -c {os.devnull} --rootdir {tmp_path} --import-mode=importlib".split()
        given += [
            "-o",
            "python_functions=bench_*",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            "-rs",
            "--benchmark-quiet",
        ]
        given += [f"--benchmark-json={results}", "--benchmark-max-time=0.01", *arguments]
        threads = torch.get_num_threads()
        try:
            status = int(pytest.main(given))
        finally:
            torch.set_num_threads(threads)
        found = json.loads(results.read_text(encoding="utf-8")) if results.exists() and results.stat().st_size else {}
        out, err = capfd.readouterr()
        return status, found, out + err

    return run


def entries(results: Results) -> dict[str, Results]:
    return {each["extra_info"]["contender"]: each for each in results["benchmarks"]}


def test_it_checks_times_and_writes(run: Run) -> None:
    status, results, out = run()
    assert status == 0, out
    found = entries(results)
    assert set(found) == {"plain PyTorch", "mmkernels", "partial", "sleepy"}
    about = found["mmkernels"]["extra_info"]
    assert (about["family"], about["case"], about["role"]) == ("toy_cases", "square", "ours")
    assert about["point"] == {"N": 16, "dtype": "float32"}
    median = found["mmkernels"]["stats"]["median"]
    assert about["tflops"] == pytest.approx(16 * 16 / median / 1e12)
    rounds = [found[name]["stats"]["data"] for name in ("plain PyTorch", "mmkernels")]
    ratios = [a / b for a, b in zip(*rounds, strict=False)]
    assert about["speedup"] == pytest.approx(statistics.median(ratios), rel=1e-3)
    assert about["error_ratio"] <= 1.2
    assert about["peak_bytes"] >= 0
    assert (about["figures"], about["curve"]) == ({"answer": 42.0}, "N")
    assert about["predicted_s"] > 0
    assert "predicted_s" not in found["plain PyTorch"]["extra_info"]
    assert set(results["mmkernels"]["rates"]["toy_cases: square"]) <= {"flops", "bytes"}
    assert found["plain PyTorch"]["extra_info"]["speedup"] == 1
    assert found["plain PyTorch"]["extra_info"]["role"] == "baseline"
    assert found["partial"]["extra_info"]["note"] == "does not give dx"
    assert found["sleepy"]["extra_info"]["note"] == "one call"
    assert found["sleepy"]["stats"]["rounds"] == 1
    assert len(found["mmkernels"]["stats"]["data"]) == found["mmkernels"]["stats"]["rounds"] >= 5
    not_timed = {each["contender"]: (each["kind"], each["why"]) for each in results["mmkernels"]["not_timed"]}
    assert not_timed["limited"] == ("skipped", "too large for it")
    assert not_timed["broken"][0] == "fails"
    assert "ZeroDivisionError" in not_timed["broken"][1]
    assert not_timed["wrong"][0] == not_timed["not a number"][0] == "wrong"
    assert not_timed["torch.compile"][0] == "absent"
    machine = results["machine_info"]["mmkernels"]
    assert {"date", "device", "isa", "threads", "versions", "native", "load"} <= set(machine)
    assert set(machine["ceilings"]) == {"bytes", "flops:float32"}
    assert results["mmkernels"]["size"] == "quick"
    assert "ZeroDivisionError" in out


def test_full_has_other_points(run: Run) -> None:
    status, results, out = run("--full", "--no-memory", "--compile", "-k", "mmkernels or compile")
    assert status == 0, out
    points = [(each["extra_info"]["contender"], each["extra_info"]["point"]["dtype"]) for each in results["benchmarks"]]
    assert sorted(points) == [(name, d) for name in ("mmkernels", "torch.compile") for d in ("bfloat16", "float32")]
    for each in results["benchmarks"]:
        assert not {"speedup", "peak_bytes"} & set(each["extra_info"])  # the baseline was not selected
        assert each["stats"]["rounds"] >= 5  # that torch.compile's first call takes long does not count
    assert results["mmkernels"]["size"] == "full"


def test_filter_takes_words(run: Run) -> None:
    status, results, out = run("--full", "--no-memory", "--filter", "N=64 bfloat16 plain")
    assert status == 0, out
    points = [(each["extra_info"]["contender"], each["extra_info"]["point"]["dtype"]) for each in results["benchmarks"]]
    assert points == [("plain PyTorch", "bfloat16")]


def test_own_wrong_result_fails(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_FACTOR", "1.001")
    status, results, out = run("--no-memory")
    assert status == 1
    assert "mmkernels: dx" in out
    assert "mmkernels" not in entries(results)
    assert "plain PyTorch" in entries(results)
    wrong = [each for each in results["mmkernels"]["not_timed"] if each["contender"] == "mmkernels"]
    assert [each["kind"] for each in wrong] == ["wrong"]


def test_own_result_is_checked_without_the_baseline(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also above the gate's size, which a kernel that overflows at large sizes passes."""
    monkeypatch.setenv("TOY_LARGE_FACTOR", "5")
    status, results, out = run("--no-memory", "--full", "-k", "mmkernels")
    assert status == 1
    assert "dx is" in out
    assert results == {}


def test_own_error_leaves_the_others(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_FACTOR", "no number")
    status, results, out = run("--no-memory")
    assert status == 1
    assert "ValueError: could not convert" in out
    assert {"plain PyTorch", "sleepy"} <= set(entries(results))
    (wrong,) = (each for each in results["mmkernels"]["not_timed"] if each["contender"] == "mmkernels")
    assert wrong["kind"] == "wrong"


def test_a_backend_that_a_case_does_not_have_is_not_named() -> None:
    settings = Settings(backends=("reference",))
    for family, has in (("planner", False), ("pretrain", False), ("contrastive", True)):
        for case in cases_of(f"mmkernels.bench.cases.{family}", settings).values():
            assert ("mmkernels [reference]" in contenders(case, settings)) == has, case.name


def test_nothing_is_set_up_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A case whose contenders all lack a package does not need it for its inputs."""
    monkeypatch.syspath_prepend(HERE)
    (case,) = cases_of("toy_cases", Settings()).values()
    without = dataclasses.replace(case, limits=lambda p, name: "needs a package", setup=lambda p, d: 1 / 0)
    found = measured("toy_cases", without, case.quick[0], list(contenders(case, Settings())), Settings(), timed=True)
    assert {result.kind for result in found.values()} <= {"skipped", "absent"}


def test_without_times_it_checks(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    status, results, _ = run("--benchmark-disable", "--no-memory")
    assert (status, results) == (0, {})
    monkeypatch.setenv("TOY_FACTOR", "1.001")
    assert run("--benchmark-disable", "--no-memory")[0] == 1


@pytest.mark.parametrize(
    "option", ["--benchmark-timer=time.time", "--benchmark-cprofile=tottime", "--benchmark-warmup=on"]
)
def test_options_that_do_nothing_here_are_refused(run: Run, option: str) -> None:
    status, _, out = run(option)
    assert status != 0
    assert f"{option.partition('=')[0]}: expected not to be given" in out


def test_recorded_times_reach_the_statistics(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [0.25, 0.5, 1.0, 2.0, 4.0]
    monkeypatch.setattr("mmkernels.bench.group.in_turn", lambda runs, *_, **__: dict.fromkeys(runs, seconds))
    _, results, _ = run("--no-memory", "-k", "mmkernels")
    (entry,) = results["benchmarks"]
    assert entry["stats"]["data"] == seconds
    assert entry["stats"]["median"] == 1.0


# Measuring


@pytest.mark.parametrize(("seconds", "rounds"), [(0.2, 5), (0.75, 7), (0.05, 3)])
def test_contenders_take_turns(seconds: float, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of .1 s each: at least five, as many as time allows, three if one takes too long."""

    def tenth(run: Callable[[], Any]) -> float:
        run()
        return 0.1

    monkeypatch.setattr(measure, "_Clock", lambda device: tenth)
    calls: list[str] = []
    runs = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    samples = measure.in_turn(runs, torch.device("cpu"), seconds=seconds, least=5, took={"b": 0.1})
    warm_ups = list("aabb") if seconds > 0.1 else list("aa")  # b took long in a call before
    assert calls == warm_ups + list("ab") * rounds
    assert samples == {"a": [0.1] * rounds, "b": [0.1] * rounds}


@pytest.mark.parametrize(
    ("rate", "sizes"), [(1e9, [256, 512]), (1e10, [256, 512, 1024]), (1e12, [256, 512, 1024, 2048])]
)
def test_ceiling_keeps_within_its_time(rate: float, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes that are tried on a machine of this many FLOP/s."""
    tried = []

    def in_turn(runs: dict[str, Any], device: torch.device, *, seconds: float) -> dict[str, list[float]]:
        tried.append(len(runs[""]()))
        return {"": [2 * tried[-1] ** 3 / rate] * 5}

    monkeypatch.setattr(measure, "in_turn", in_turn)
    assert measure.matmul_peak(torch.float32, torch.device("cpu"), 2.0) == pytest.approx(rate)
    assert tried == sizes


def test_peak_memory_is_that_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(HERE)

    def peak(n: int, contender: str = "mmkernels") -> int | str:
        return memory.peak_memory_in_child(
            memory.Request("toy_cases", "square", {"N": n, "dtype": "float32"}, contender, Settings())
        )

    found = peak(2**21)  # 64 MiB of x: its square, then its gradient and that times a factor
    assert isinstance(found, int)
    assert 120 * 2**20 < found < 220 * 2**20
    assert peak(16, "broken") == "ZeroDivisionError: division by zero"


# The benches that there are


def sized(case: Case) -> dict[str, Any]:
    """A point of the case that takes no time."""
    small = {"n": 500, "batch": 16, "most": 128} | ({} if case.sample else {"MiB": 1})
    point = dict((case.quick or case.full)[0])
    point |= {"T": 256} if "V" in point else {}
    return {**point, **{name: value for name, value in small.items() if name in point}, **(case.gate or {})}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_case_is_right(family: str) -> None:
    settings = Settings(memory=False, seconds=0.01, least=1)
    for case in cases_of(f"mmkernels.bench.cases.{family}", settings).values():
        names = list(contenders(case, settings))
        found = measured("", case, sized(case), names, settings, timed=False)
        faults = {name: result.why for name, result in found.items() if result.kind in ("wrong", "fails")}
        faults.pop("NestedTensor", None)  # the CPU's has no such attention in some releases
        assert not faults, f"{case.name}: {faults}"
        assert found[next(name for name in names if name.startswith("mmkernels"))].kind in ("checked", "timed")
        assert not case.baseline or set(case.baseline) & set(names), f"{case.name}: no such baseline"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_point_has_its_own_title(family: str, device: str) -> None:
    for full in (False, True):
        settings = Settings(full=full, device=device, peers=True, backends=("reference",))
        for case in cases_of(f"mmkernels.bench.cases.{family}", settings).values():
            points = [json.dumps(point, sort_keys=True) for point in points_of(case, settings)]
            assert len(points) == len(set(points)), case.name
            for point in points_of(case, settings):
                work = case.work(point)
                assert work.flops or work.bytes or work.items or case.sample, case.name


# The command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attentive"], "family: expected some of attention, "),
        (["--quick", "--full"], "--quick: expected not to be given with --full"),
        (["--seconds", "0"], "--seconds: expected a number > 0, got 0.0"),
        (["--seconds", "inf"], "--seconds: expected a number > 0, got inf"),
        (["--device", "nosuch"], "--device: expected cpu, cuda or cuda:N, got 'nosuch'"),
        (["--device", "cuda:99"], "CUDA devices, got 'cuda:99'"),
        (["--backend", "nosuch"], "--backend: expected some of native, triton, reference, got 'nosuch'"),
        (["planner", "--compare", "a", "b"], "--compare: expected alone, got families, too"),
        (["--html", "."], "--html: expected a file, got the folder '.'"),
        (["--threads", "-1"], "--threads: expected a number >= 0, got -1"),
        (["--json", "/no/such/folder/a.json"], "--json: expected a path in a folder that exists"),
        (
            ["packing", "--filter", "nothing_like_this"],
            "--filter: expected words of some test's name, got 'nothing_like_this'",
        ),
    ],
)
def test_command_says_what_is_wrong(arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    assert message in capfd.readouterr().err


def test_command_writes_results(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["planner", "--filter", "counts", "--seconds", "0.01", "--no-memory", "--json", str(tmp_path)]
    assert cli.main(arguments) == 0
    (path,) = tmp_path.glob("part-planner-counts-*-quick.json")  # not in the place of a whole run
    results = json.loads(path.read_text(encoding="utf-8"))
    assert {each["extra_info"]["case"] for each in results["benchmarks"]} == {"counts"}
    assert list(tmp_path.iterdir()) == [path]
    assert "planner: counts" in capfd.readouterr().out


def test_both_ways_measure_the_same() -> None:
    """`benches/` names each bench that the command runs."""
    folder = Path(__file__).resolve().parents[2] / "benches"
    assert {path.stem.removeprefix("bench_") for path in folder.glob("bench_*.py")} == set(FAMILIES)
    assert sys.modules["mmkernels.bench.suite"].bench_planner
