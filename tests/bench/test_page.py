"""The page of a run: it shows what was measured and what failed, and asks nothing of any server."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from bench.results import entry, results

pytest.importorskip("jinja2", reason="mmkernels[bench] is not installed")

from mmkernels.bench.page import render
from mmkernels.bench.page.summary import summary_of, three

F32 = {"N": 1024, "E": 512, "dtype": "float32"}


def page_of(found: Any, tmp_path: Path) -> str:
    path = tmp_path / "page.html"
    render(found, path)
    return path.read_text(encoding="utf-8")


def measured() -> list[dict[str, Any]]:
    more = {"flops": 4e9, "bytes": 4e6}
    return [
        entry("loss", F32, "plain PyTorch", "baseline", [0.2, 0.21, 0.22], speedup=1.0, peak_bytes=8e6, **more),
        entry(
            "loss",
            F32,
            "mmkernels",
            "ours",
            [0.1, 0.1, 0.1],
            speedup=2.1,
            memory_ratio=0.25,
            of_ceiling=0.8,
            error_ratio=0.9,
            tflops=0.04,
            note="a note",
            **more,
        ),
    ]


def curve(predicted: float | None = 1.1) -> list[dict[str, Any]]:
    found = []
    for n in (1024, 2048, 4096):
        seconds = 1e-7 * n * n
        more = {} if predicted is None else {"predicted_s": predicted * seconds}
        point = {**F32, "N": n}
        found.append(entry("loss over N", point, "mmkernels", "ours", [seconds] * 5, curve="N", **more))
    return found


def test_it_shows_what_was_measured(tmp_path: Path) -> None:
    text = html.unescape(page_of(results(measured()), tmp_path))
    for shown in ("A CPU", "avx2", "0123456789ab", "2.10x", "25%", "80%", "a note", "torch 2.13.0", "210 ms"):
        assert shown in text, shown
    assert "wrong" not in re.sub(r"<style>.*</style>", "", text, flags=re.S)


def test_it_asks_nothing_of_any_server(tmp_path: Path) -> None:
    text = page_of(results(measured() + curve()), tmp_path)
    addresses = set(re.findall(r"https?://[^\"' <]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    assert not re.findall(r"<(?:link|script|img|iframe)\b|@import|url\(", text)


def test_failures_come_first(tmp_path: Path) -> None:
    fault = {"group": "contrastive: loss", "family": "contrastive", "case": "loss", "point": F32, "role": "ours"}
    fault |= {"contender": "mmkernels", "kind": "wrong", "why": "dq: 14 times <script>alert(1)</script>"}
    peer = {**fault, "contender": "a peer", "role": "peer", "why": "its loss"}
    text = page_of(results(measured(), not_timed=[fault, peer]), tmp_path)
    assert "<script>" not in text
    assert "1 of our results is wrong" in text
    assert text.index("dq: 14 times") < text.index("<table")
    assert text.count("wrong: not timed") == 1
    assert "its loss" in text[text.index("<details") :]


def test_curves_state_how_far_the_model_is_off(tmp_path: Path) -> None:
    text = page_of(results(curve()), tmp_path)
    assert "The cost model is off by 10% in the median, 10% at most; of calls of 50 ms and more, 10% at most." in text
    assert "Without a prediction." in page_of(results(curve(None)), tmp_path)
    series = {"case": "loss over ranks", "x": "W", "series": "ring", "of": {"E": 8}, "machine": "H100"}
    ranks = {**series, "points": [[8, 0.001], [64, 0.01]]}
    assert "loss over ranks, predicted for H100 (E = 8)" in page_of(results([], predictions=[ranks]), tmp_path)


def test_charts_are_well_formed_and_described(tmp_path: Path) -> None:
    text = page_of(results(measured() + curve()), tmp_path)
    charts = [ElementTree.fromstring(each) for each in re.findall(r"<svg.*?</svg>", text, re.S)]
    assert len(charts) == 2  # a curve and a roofline
    for chart in charts:
        names = [child.tag.rpartition("}")[2] for child in chart]
        assert names[:2] == ["title", "desc"]
        assert chart.get("role") == "img"
        for line in chart.iter("{http://www.w3.org/2000/svg}polyline"):
            for x, y in (map(float, each.split(",")) for each in line.get("points", "").split()):
                assert 0 <= x <= 440
                assert 0 <= y <= 300


@pytest.mark.parametrize(
    "found",
    [
        {},
        results([]),
        results(measured()[1:]),
        {"benchmarks": measured()},
        results([entry("loss", {}, "mmkernels", "ours", [0.1] * 3, speedup=float("nan"), of_ceiling=None, flops=0)]),
        results([{"group": None, "stats": {"median": None}, "extra_info": {}}, {"group": "x", "stats": {}}]),
        results([entry("loss", {"N": 0, "dtype": "float32"}, "mmkernels", "ours", [0.1] * 3, curve="N")]),
    ],
    ids=["nothing", "empty", "no baseline", "no machine", "no numbers", "no times", "zero on a logarithmic axis"],
)
def test_it_copes_without_parts(found: Any, tmp_path: Path) -> None:
    assert "<h1>" in page_of(found, tmp_path)


def test_it_reads_files(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(results(measured())), encoding="utf-8")
    assert page_of(path, tmp_path) == page_of(results(measured()), tmp_path)


def test_every_number_has_three_digits() -> None:
    values = (0, 0.000123456, 0.0123456, 0.123456, 1.23456, 12.3456, 123.456, 1234.56, 123456.0, 12345678.0, -1.5)
    expected = ["0", "1.23e-04", "0.0123", "0.123", "1.23", "12.3", "123", "1,230", "123,000", "1.23e+07", "-1.50"]
    assert [three(value) for value in values] == expected


def test_of_ours_the_default_counts() -> None:
    """A strategy of the planner, or a backend by its name, is measured before it."""
    others = [
        entry("loss", F32, name, "ours", [0.01] * 3, speedup=21.0) for name in ("mmkernels best_fit", "mmkernels [x]")
    ]
    (family,) = summary_of(results([*others, *measured()]))
    assert [row.speed for row in family.rows] == ["2.10x"]


def test_ratios_to_the_fastest_baseline_count() -> None:
    slow = entry("loss", F32, "two matrices", "baseline", [0.4] * 3, speedup=0.5)
    (family,) = summary_of(results([slow, *measured()]))
    assert [(row.against, row.speed) for row in family.rows] == [("plain PyTorch", "2.10x")]
    assert family.headline == "2.10x in the median, from 2.10x to 2.10x"
