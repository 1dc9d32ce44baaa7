"""The page of a data report: its figures agree, and its charts name every group."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pretrain.salted import pixels

from mmkernels.pretrain.data_report import DataReport, data_report
from mmkernels.pretrain.data_report.drawings import histogram, scatter
from mmkernels.pretrain.data_report.kinds import KINDS


def page_of(folder: Path, captions: list[object]) -> str:
    for i in range(len(captions)):
        Image.fromarray(pixels(i)).save(folder / f"{i}.png")
    rows = [{"image": f"{i}.png", "caption": caption} for i, caption in enumerate(captions)]
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data_report(DataReport(f"folder:{folder}", eval_fraction=0.0, vocabulary=300, out=folder / "r"))
    return (folder / "r" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("blank", "dots", "heading"),
    [
        (8, 9, "Empty caption: 17 <small>9 shown, 8 among what cannot be read</small>"),
        (0, 12, "Empty caption: 12 <small>9 shown</small>"),
        (2, 3, "Empty caption: 5 <small>3 shown, 2 among what cannot be read</small>"),
        (0, 4, "Empty caption: 4"),
        (4, 0, None),
    ],
)
def test_headings_count_as_the_table_does(blank: int, dots: int, heading: str | None, tmp_path: Path) -> None:
    page = page_of(tmp_path, [*(f"a thing {i}" for i in range(6)), *[""] * blank, *["..."] * dots])
    headings = re.findall(r"<h3>(Empty caption.*?)</h3>", page)
    assert headings == ([] if heading is None else [heading])
    row = re.search(rf"<code>empty</code></td><td [^>]*>([\d,]+)</td>.*?{KINDS['empty'].title}", page)
    assert row is not None and int(row[1]) == blank + dots
    assert f"{blank + dots} of them empty" in page


@pytest.mark.parametrize("name", ["_hidden", "__", "", "$5 and $10", "<i>x</i>", "_nolegend_"])
def test_legends_name_every_group(name: str) -> None:
    """Whatever its name: matplotlib hides labels that begin with an underscore."""
    values = np.arange(60.0)
    drawn = {
        "lines": (lambda names: histogram({each: values + i for i, each in enumerate(names)}, "pixels")),
        "points": (lambda names: scatter(np.stack([values, values], 1), [names[0]] * 30 + [names[1]] * 30, names)),
    }
    for what, draw in drawn.items():
        shown, plain = legend(draw([name, "other"])), legend(draw(["plain", "other"]))
        assert shown == [name, "other"] and plain == ["plain", "other"], what


def legend(svg: str) -> list[str]:
    part = svg[svg.index('<g id="legend_1">') :]
    unescaped = (
        text.replace("&lt;", "<").replace("&gt;", ">") for text in re.findall(r"<text[^>]*>([^<]*)</text>", part)
    )
    return [text.replace("\u200b", "") for text in unescaped]
