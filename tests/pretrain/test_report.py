"""The report: one self-contained file."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from mmkernels.pretrain import Config, train
from mmkernels.pretrain.metrics import Figure
from mmkernels.pretrain.report import figure_table
from mmkernels.pretrain.report.charts import curve_chart, figure_chart, loss_chart, overlaid
from mmkernels.pretrain.report.page import headlines

Make = Callable[..., Config]


def test_report(tiny: Make, pictures: Path) -> None:
    rows = (
        (pictures / "captions.jsonl").read_text(encoding="utf-8").replace("a red circle", "a <b>red</b> circle & more")
    )
    (pictures / "captions.jsonl").write_text(rows, encoding="utf-8")
    folder = train(tiny(eval_fraction=0.5)).folder
    page = folder.report.read_text(encoding="utf-8")
    evaluations = folder.records("eval")

    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page), "nothing is loaded from elsewhere"
    training = page[page.index("<h2>Training") : page.index("Further curves")]
    first = {figure["name"] for figure in evaluations[-1]["figures"] if figure["headline"]}
    assert training.count("<svg") == 1 + len(first), "the loss, and the figures that come first"
    pictures_shown = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures_shown) > 20
    for encoded in pictures_shown[:3]:
        assert Image.open(BytesIO(base64.b64decode(encoded))).size == (48, 48)

    table = page[page.index("<h2>Held-out figures") : page.index("Split held_out")]
    for figure in evaluations[-1]["figures"]:
        assert f"<b>{100 * figure['value']:.1f}</b>" in table
        assert f"chance {100 * figure['chance']:.1f}<" in table
    assert 'class="right"' in page, "with five answers of fifteen some are right"
    assert "a &lt;b&gt;red" in page or "<b>red" not in page, "captions are text"
    assert "model.width" in page
    assert "at chance" in page


def test_figure_table(tiny: Make) -> None:
    folder = train(tiny()).folder
    table, record = figure_table(folder), folder.records("eval")[-1]
    assert table.count("→") == 2, "both ways"
    for figure in record["figures"]:
        assert f"{100 * figure['value']:.1f}% ({100 * figure['chance']:.1f})" in table


def test_figures_of_other_kinds() -> None:
    """Shares are percentages; a loss is not, and one without chance has no brackets."""
    loss = Figure("words: loss", 2.5, None, percent=False)
    assert (loss.shown(), loss.shown_chance()) == ("2.500", "")
    share = Figure("accuracy", 0.251, 0.2)
    assert (share.shown(), share.shown_chance()) == ("25.1", "20.0")


def test_a_run_that_holds_nothing_out_has_a_report(tiny: Make) -> None:
    folder = train(tiny(eval_fraction=0.0, steps=3)).folder
    page = folder.report.read_text(encoding="utf-8")
    assert "<h2>Held-out figures" not in page
    assert page[page.index("<h2>Training") : page.index("Further curves")].count("<svg") == 1


def test_many_splits_share_a_tile_and_a_curve(tmp_path: Path) -> None:
    """Languages, say: their mean and range."""
    shares = [0.1 + 0.01 * i for i in range(16)]
    records = [
        {"split": f"s{i}", "step": step, "figures": [Figure("words", x * step, 0.02, headline=True).to_dict()]}
        for step in (1, 2)
        for i, x in enumerate(shares)
    ]
    newest = {record["split"]: record for record in records}
    (tile,) = headlines(newest, [], {})
    assert tile == {"value": "35.0%", "what": "words, mean of 16 splits", "note": "20.0 to 50.0, chance 2.0"}
    assert len(headlines(dict(list(newest.items())[:3]), [], {})) == 3
    many, few = figure_chart(records, list(newest), "words"), figure_chart(records, ["s0", "s1"], "words")
    assert "mean of 16, and range" in many and "s1" not in many.replace("s15", "")
    assert ">s0<" in few and ">s1<" in few and "mean of" not in few


@pytest.mark.parametrize("name", ["_mine: held_out", "_", "__x", "$a$ and $b$", "<b> & c"])
def test_a_legend_has_every_name(name: str) -> None:
    """Those too that matplotlib would hide."""
    splits = ("plain", name)
    records = [{"split": s, "step": 1, "figures": [Figure("words", 0.5, 0.1).to_dict()]} for s in splits]
    drawn = [
        html.unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", figure_chart(records, splits, "words"))
    ]
    assert [text for text in drawn if text in splits] == list(splits)


def test_a_single_point_is_seen() -> None:
    """There is no line to see."""
    colours = {"a": "#112233", "b": "#445566"}
    one, two = [(1, 2.0)], [(1, 2.0), (2, 3.0)]
    for drawn, seen in (
        (overlaid({"a": one, "b": two}, colours), 1),
        (overlaid({"a": one, "b": one}, colours), 2),
        (overlaid({"a": two, "b": two}, colours), 0),
        (overlaid({"a": one, "b": two}, colours, points=True), 3),
        (loss_chart([{"step": 1, "loss": 2.0}]), 1),
        (loss_chart([{"step": step, "loss": 2.0} for step in (1, 2)]), 0),
        (curve_chart(one), 1),
        (curve_chart(two), 0),
    ):
        marks = [mark for mark in re.findall(r"<use [^>]*>", drawn) if re.search("fill: #(112233|445566|2563eb)", mark)]
        assert len(marks) == seen
