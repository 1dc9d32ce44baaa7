"""`mmkernels scale`: its tables, its JSON, a measured machine's file, and its error messages."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("tyro", reason="mmkernels[plan] is not installed")
pytest.importorskip("tabulate", reason="mmkernels[plan] is not installed")

import named

from mmkernels import Machine, TrainingStep, cli, plan_scale


def shown(capsys, *arguments: str) -> str:
    assert cli.main(["scale", *arguments]) == 0
    return capsys.readouterr().out


def test_tables(capsys) -> None:
    lines = shown(capsys).splitlines()
    assert lines[0] == "H100: data sheet: 60% of its products, 80% of its memory and links; not measured"
    for ranks in ("8", "64", "512", "4,096"):
        assert sum(line.split()[:1] == [ranks] for line in lines) == 3  # both exchanges, and the step
    assert sum(" * " in line for line in lines) == 4


def test_figures_are_those_of_plan_scale(capsys) -> None:
    options = ["--encoder", "64x2x10", "--encoder", "32x1x5", "--width", "48", "--reduction", "fsdp", "--cached"]
    found = json.loads(shown(capsys, *options, "--batch", "1000", "--ranks", "3", "16", "--json"))
    parameters = 12 * (64**2 * 2 + 32**2)
    flops = 2 * ((8 + 16) * 64**2 * 10 + 4 * 64 * 100) + (8 + 16) * 32**2 * 5 + 4 * 32 * 25
    for plan, rows in zip(found["plans"], (334, 63), strict=True):
        step = TrainingStep(rows, 48, parameters, float(flops), cached=True, reduction="fsdp", units=3)
        (expected,) = plan_scale(step, [plan["ranks"]], machine=Machine.named("H100"))
        assert plan["exchanges"]["ring"]["received"] == expected.exchanges["ring"].received
        assert plan["seconds"] == list(expected.seconds)
        assert plan["memory"] == expected.memory


def test_a_machine_from_a_file(tmp_path: Path, capsys) -> None:
    machine = replace(Machine.named("H200"), name="ours", flops={"bfloat16": 5e14}, source="measured")
    machine.save(tmp_path / "ours.json")
    assert Machine.load(tmp_path / "ours.json") == machine
    assert shown(capsys, "--machine", str(tmp_path / "ours.json")).startswith("ours: measured\n")


def test_mistakes(tmp_path: Path, capsys) -> None:
    (tmp_path / "broken.json").write_text('{"name": 3}', encoding="utf-8")
    for arguments, expected in (
        (["--machine", "H900"], "name: expected one of A100-80GB, H100, H200, CPU, got 'H900'"),
        (["--machine", str(tmp_path / "none.json")], "No such file"),
        (["--machine", str(tmp_path / "broken.json")], "expected a file that Machine.save wrote"),
        (["--encoder", "64x2"], "--encoder: expected WIDTHxLAYERSxTOKENS, such as 1024x24x257, got '64x2'"),
        (["--ranks", "0"], "ranks[0]: expected an integer >= 1, got 0"),
        (["--loss", "siglip", "--negatives", "8"], "negatives: expected 0 with loss='siglip', got 8"),
    ):
        with named.case(*arguments):
            assert cli.main(["scale", *arguments]) == 1
            assert expected in capsys.readouterr().err
