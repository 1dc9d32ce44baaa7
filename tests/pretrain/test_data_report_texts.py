"""Texts compared and judged: what cannot be seen makes no difference, and what says nothing is found, and no more."""

from __future__ import annotations

import json
import sys
import time
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from pretrain.salted import FRACTION, caption_in, names, pixels

from mmkernels.pretrain.data.seeds import is_held_out
from mmkernels.pretrain.data_report import DataReport
from mmkernels.pretrain.data_report.report import Report, examine
from mmkernels.pretrain.data_report.texts import boilerplate, expected_script, fits, normalised

INVISIBLE = (
    "\u00ad\u034f\u061c\u115f\u180e\u200b\u200c\u200d\u200e\u200f\u202a\u2060\u2063\u2066\u3164\ufe0e\ufe0f\ufeff\uffa0"
)
INVISIBLE += "\U000e0001\U000e0100"


def found(report: Report, kind: str) -> set[str]:
    return names(iter(report.findings), kind)


@pytest.mark.parametrize("char", INVISIBLE, ids=lambda char: f"U+{ord(char):04X}")
def test_what_cannot_be_seen_makes_no_difference(char: str) -> None:
    for text in ("two herons ♥ é", "2 kites", "東京の夜"):
        assert normalised(char.join(text)) == normalised(text)
        assert normalised(f"{char}{text}{char}") == normalised(text)
        assert normalised(char.join(unicodedata.normalize("NFD", text))) == normalised(text)
    assert normalised(char * 3) == ""
    assert boilerplate(f"image{char}") == "nothing said" and boilerplate(char.join("IMG_1234")) == "a file name"


@pytest.mark.parametrize(
    "text", ["\u2800", "\ufffc", "\u0301", "\u0301 \u20d7", "- \u0301 -", "\u0903", "\u200d\u200d"]
)
def test_what_says_nothing_is_empty(text: str) -> None:
    assert normalised(text) == ""


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("#\ufe0f\u20e3", "\u20e3"),
        ("❤\ufe0f", "❤"),
        ("é", "é"),
        ("हिन्दी", "हिन्दी"),
        ("👩\u200d🚀", "👩🚀"),
        ("می\u200cخواهم", "میخواهم"),
        ("well-known", "well known"),
        ("\U0001f3f4\U000e0067\U000e0062\U000e007f", "\U0001f3f4\U000e0067\U000e0062\U000e007f"),
    ],
)
def test_what_can_be_seen_stays(text: str, normal: str) -> None:
    assert normalised(text) == normal


def test_no_format_character_of_unicode_counts() -> None:
    """Those that are alone, tags of no flag among them."""
    for code in range(sys.maxunicode + 1):
        char = chr(code)
        if unicodedata.category(char) == "Cf":
            assert normalised(char) == "", f"U+{code:04X}"


def written(folder: Path, captions: list[str]) -> str:
    (folder / "t.jsonl").write_text(
        "".join(json.dumps({"caption": each}) + "\n" for each in captions), encoding="utf-8"
    )
    return f"folder:{folder}"


def test_copies_of_texts_are_found_whatever_is_hidden_in_them(tmp_path: Path) -> None:
    said = "two herons ♥ by the river"
    hidden = ["e\u200b", "\u00ade", "e\ufeff", "\u200ce\u200c"]
    copies = [*(said.replace("e", each) for each in hidden), said.replace("♥", "♥\ufe0f")]
    source = written(tmp_path, [said, *copies, "two heron s ♥ by the river"])
    report = examine(DataReport(source, recipe="gpt", eval_fraction=0.0))
    assert found(report, "duplicates") == {f"t.jsonl: line {i}" for i in range(2, 7)}


def test_leaks_of_texts_are_found_whatever_is_hidden_in_them(tmp_path: Path) -> None:
    held_out = caption_in(True, "a kite over the sea")
    leaks = (held_out.replace("k", "k" + "\u200b" * n) for n in range(1, 99))
    leak = next(each for each in leaks if not is_held_out(each, FRACTION))
    source = written(tmp_path, [held_out, leak, caption_in(False, "two herons")])
    report = examine(DataReport(source, recipe="gpt", eval_fraction=FRACTION))
    assert found(report, "leaked") == {"t.jsonl: line 2"}


def test_captions_that_cannot_be_seen_are_empty(tmp_path: Path) -> None:
    source = written(tmp_path, ["\ufe0f", "\u034f", "\u2800", "\u3164", "\u200b", "\u0301", "♥", "é"])
    report = examine(DataReport(source, recipe="gpt", eval_fraction=0.0))
    assert found(report, "empty") == {f"t.jsonl: line {i}" for i in range(1, 7)}


@pytest.mark.parametrize(
    "text",
    [
        "my holiday photo 12.jpg",
        "Screenshot 2024-01-01 at 10.00.00.png",
        "Screenshot 2024-01-01 at 10.00.00\u202fAM.png",
        "Screen Shot 2024-01-01 at 10.00.00",
        "WhatsApp Image 2020-01-01 at 10.00.00.jpeg",
        "WhatsApp Image 2020-01-01 at 10.00.00 (1).jpeg",
        "pics/my pic.jpg",
        "my pics/a b.jpg",
        "C:\\pics\\a b.jpg",
        "“IMG_1234.jpg”",
        "'my pic.jpg'",
        "[photo (3).png]",
        *(f"a.{suffix}" for suffix in ("avif", "JFIF", "heif", "jxl", "mp4", "WAV")),
        "IMG-20200101-WA0001",
        "20200101_123456",
        "мой отпуск 12.jpg",
        "休暇 写真.png",
    ],
)
def test_names_of_files(text: str) -> None:
    assert boilerplate(text) == "a file name"
    assert boilerplate(f"  {text}\n") == boilerplate(f'"{text}"') == "a file name"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("Untitled-1", "nothing said"),
        ("untitled 3", "nothing said"),
        ('"image"', "nothing said"),
        ("[image]", "nothing said"),
        ("「写真」", ""),
        ("No description available.", "nothing said"),
        ("caf&eacute;", "markup"),
        ("a kite &#x2014; red", "markup"),
        ("see https://a.b/c d.png", "a link"),
        ("open the file settings.json", ""),
        ("open the file settings.png", ""),
        ("a screenshot of image.png", ""),
        ("this is my photo.jpg", ""),
        ("the same picture as in photo.jpg", ""),
        ("a diagram: on the left, input.png", ""),
        ("two herons\nheron.jpg", ""),
        ("a kite over the sea.", ""),
        ("an untitled painting", ""),
        ("[a kite]", ""),
        ("a photo (left) and a drawing", ""),
        ("rock &roll; 12 &c;", ""),
        ("AT&T; R&D;", ""),
        ("in 2020", ""),
        ("20200101", ""),
        ("a dot.com office", ""),
        ("word " * 40 + "a.jpg", ""),
    ],
)
def test_what_may_be_a_caption_and_what_may_not(text: str, what: str) -> None:
    assert boilerplate(text) == what


@pytest.mark.parametrize(
    ("counts", "expected", "strange"),
    [
        ({"Kana": 96, "Han": 4}, "Kana", set()),
        ({"Kana": 60, "Han": 36, "Latin": 4}, "Kana", {"Latin"}),
        ({"Kana": 20, "Han": 78, "": 2}, "Kana", set()),
        ({"Han": 97, "Kana": 3}, "Han", {"Kana"}),
        ({"Han": 93, "Kana": 3, "Latin": 4}, "", set()),
        ({"Latin": 97, "Han": 3}, "Latin", {"Han"}),
        ({"Kana": 90, "Latin": 10}, "", set()),
        ({"": 99, "Latin": 1}, "", set()),
    ],
)
def test_names_in_han_are_in_order_where_kana_are(counts: dict[str, int], expected: str, strange: set[str]) -> None:
    assert expected_script(Counter(counts)) == expected
    assert {each for each in counts if each and expected and not fits(each, expected)} == strange


def test_names_in_han_among_japanese_captions(tmp_path: Path) -> None:
    things = [
        f"{colour}{thing}がある"
        for colour in ("あかい", "しろい", "くろい")
        for thing in ("いぬ", "ねこ", "いえ", "ふね")
    ]
    captions = [
        *things,
        *(f"{each}よ" for each in things),
        *(f"{each}か" for each in things),
        "東京駅前広場",
        "red kites",
    ]
    for i in range(len(captions)):
        Image.fromarray(pixels(i)).save(tmp_path / f"{i}.png")
    rows = [{"image": f"{i}.png", "caption": each} for i, each in enumerate(captions)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    report = examine(DataReport(f"folder:{tmp_path}", eval_fraction=0.0))
    assert found(report, "script") == {f"{len(captions) - 1}.png"}


@pytest.mark.parametrize("piece", ["(", "/", "&", "<a", "a.jpg ", "of ", "\u200b", "://", "' ", ".jp", "image ", "1-"])
def test_long_texts_take_no_time(piece: str) -> None:
    """A caption may have 131,072 characters."""
    text = piece * (131_072 // len(piece))
    begun = time.process_time()
    boilerplate(text)
    normalised(text)
    assert time.process_time() - begun < 5
