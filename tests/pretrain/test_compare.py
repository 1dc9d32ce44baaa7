"""`mmkernels compare`: runs side by side, from their folders alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pretrain.stored_runs import OWN, figure, grouped, stored

from mmkernels import cli
from mmkernels.pretrain.metrics import Figure
from mmkernels.pretrain.report.compare import best_of, compared, comparison_page, comparison_table
from mmkernels.pretrain.report.stored_run import named
from mmkernels.pretrain.run_folder import RunFolderError
from mmkernels.pretrain.transfer import Transfer


def test_settings_figures_and_cost(tmp_path: Path) -> None:
    r10 = "image → text R@10"
    a = stored(tmp_path / "a", [figure(r10, 0.5, headline=True), figure("loss", 2.0, percent=False)], lr=1e-3)
    b = stored(tmp_path / "b", [figure(r10, 0.6, headline=True), figure("own", 0.3)], lr=2e-3, seed=1)
    found = compared([a, b])
    assert found.settings == {"lr": ["0.001", "0.002"], "seed": ["0", "1"]}
    (table,) = found.tables
    (row,) = table.rows
    assert (table.data, row.split, row.name, row.best) == ("emoji", "held_out", r10, 1)
    assert [f.value for f in row.figures if f is not None] == [0.5, 0.6], "the newest"
    assert found.alone == {"a": ["held_out: loss"], "b": ["held_out: own"]}
    summary = found.runs[0].summary()
    assert (summary["minutes"], summary["parameters"], summary["steps"]) == ("2.0", "2.50 M", "4")
    assert (summary["tokens/s, median"], summary["peak memory"]) == ("250", "300 MB")
    assert summary["loss, last steps"] == f"{8 * (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4:.3f}"

    text = comparison_table(found)
    assert re.search(r"held_out: image → text R@10 +50\.0% \[48\.0, 52\.0\] \(10\.0\) +\*60\.0% \[58\.0, 62\.0\]", text)
    page = comparison_page(found)
    assert page.count('class="cell best"') == 1 and page.count("<svg") == 2, "the loss, and the figure that comes first"
    assert not re.search(r"""(src|href)=["'](?!data:|#)|url\((?!#)""", page)
    assert not found.remarks


@pytest.mark.parametrize(
    ("values", "widths", "higher", "best"),
    [
        ((0.5, 0.6), (0.04, 0.04), True, 1),
        ((0.5, 0.6), (0.06, 0.06), True, None),
        ((0.5, 0.6), (0.05, 0.05), True, None),  # they touch
        ((0.5, 0.6), (0.04, 0.04), False, 0),
        ((0.5, 0.6, 0.9), (0.04, 0.5, 0.01), True, None),  # the widest reaches the best
        ((0.5, 0.6), (0.04, None), True, None),
        ((0.5, None, 0.6), (0.04, None, 0.04), True, 2),
        ((0.05, 0.1), (0.01, 0.01), True, None),  # the better one is chance
        ((0.05, 0.15), (0.01, 0.01), True, 1),
        ((0.05, 0.15), (0.01, 0.01), False, 0),
        ((0.2, 0.15), (0.01, 0.01), False, None),
    ],
)
def test_the_best_is_apart(values: Any, widths: Any, higher: bool, best: int | None) -> None:
    figures = []
    for value, width in zip(values, widths, strict=True):
        ends = {} if width is None else {"low": value - width, "high": value + width}
        chance = 0.1 if higher or max(v for v in values if v is not None) < 0.3 else 0.9
        figures.append(None if value is None else Figure("x", value, chance, higher_is_better=higher, **ends))
    assert best_of(figures) == best


def test_runs_of_different_recipes_and_data(tmp_path: Path) -> None:
    """Figures of one name are compared on the same data alone; names that are no HTML are."""
    x = [figure("<b>x</b> & 🙂", 0.5, None, headline=True)]
    one = stored(tmp_path / "one <i>", x, recipe="clip")
    two = stored(tmp_path / "two", x, recipe="siglip", wiring={"objectives.sigmoid.weight": 2.0})
    three = stored(tmp_path / "three", x, data="scenes", eval_limit=5)
    found = compared([one, two, three])
    assert [(t.data, [r.name for r in t.runs]) for t in found.tables] == [("emoji", ["one <i>", "two"])]
    assert list(found.alone) == ["three"]
    assert found.settings["objectives.sigmoid.weight"] == [None, "2.0", None]
    assert found.remarks == [
        "The runs have different recipes: clip, siglip.",
        "The runs have different data: emoji, scenes.",
        "Figures are compared where held-out samples, name and task agree; losses where name and task do.",
    ]
    page = comparison_page(found)
    assert "&lt;b&gt;x&lt;/b&gt; &amp; 🙂" in page and "<b>x" not in page and "one <i>" not in page
    assert "none is marked as the best" in page
    assert "Loss: contrast" in page and "Loss: sigmoid" not in page, "which one run alone has"


def test_other_held_out_samples_are_other_data(tmp_path: Path) -> None:
    """A gallery of 20 is not put beside one of 5; what does not change the held-out samples splits nothing."""
    x = [figure("image → text R@10", 0.5, headline=True)]
    fifth = [stored(tmp_path / "a", x, eval_fraction=0.2, **OWN)]
    fifth += [stored(tmp_path / "b", x, eval_fraction=0.2, seed=1, batch=7, train_fraction=0.1, **OWN)]
    fifth += [stored(tmp_path / "c", x, eval_fraction=0.2, held_out_by=("text", "image"), without=("image",), **OWN)]
    half = [stored(tmp_path / name, x, eval_fraction=0.5, **OWN) for name in ("d", "e")]
    found = compared([*fifth, *half])
    one, other = "folder:x, eval_fraction 0.2", "folder:x, eval_fraction 0.5"
    assert grouped(found) == [(one, ["a", "b", "c"]), (other, ["d", "e"])]
    assert found.remarks[0] == "Runs on the same data hold out different samples, by eval_fraction."
    assert f"figures on {one}" in comparison_table(found) and f"Figures on {one}" in comparison_page(found)


@pytest.mark.parametrize(
    "change",
    [
        {"eval_fraction": 0.5},
        {"held_out_by": ("image",)},
        {"validate": True},
        {"eval_limit": 5},
        {"csv_caption_key": "title"},
        {"recipe": "mae"},  # which does not read the captions that tell concepts
    ],
)
def test_what_decides_on_held_out_samples(tmp_path: Path, change: dict[str, Any]) -> None:
    x = [figure("image → text R@10", 0.5)]
    one, other = stored(tmp_path / "one", x, **OWN), stored(tmp_path / "other", x, **{**OWN, **change})
    found = compared([one, other])
    assert not found.tables and set(found.alone) == {"one", "other"}


def test_what_is_held_out_of_data_that_come_along_is_fixed(tmp_path: Path) -> None:
    x = [figure("image → text R@10", 0.5)]
    a, b = stored(tmp_path / "a", x), stored(tmp_path / "b", x, eval_fraction=0.5, held_out_by=("image", "text"))
    assert grouped(compared([a, b])) == [("emoji", ["a", "b"])]


def test_other_labels_are_other_tasks(tmp_path: Path) -> None:
    """A head of one name may learn anything."""
    x = [figure("classes: accuracy", 0.5, headline=True), figure("image: kind by a linear probe", 0.4)]
    runs = []
    for label in ("kind", "title"):
        own = {**OWN, "transfers": (Transfer("classify", label, ("image",)),)}
        wiring = {"objectives.classes.label": label}
        runs += [stored(tmp_path / f"{label}{i}", x, wiring=wiring, **own) for i in range(2)]
    found = compared(runs)
    (table,) = found.tables
    assert [(row.title, [f is not None for f in row.figures]) for row in table.rows] == [
        ("classes: accuracy (Answer of kind)", [True, True, False, False]),
        ("image: kind by a linear probe", [True] * 4),
        ("classes: accuracy (Answer of title)", [False, False, True, True]),
    ]
    page = comparison_page(found)
    assert "Loss: classes (Answer of kind)" in page and "Loss: classes<" not in page
    found = compared(runs[1:3])
    assert [row.name for row in found.tables[0].rows] == ["image: kind by a linear probe"]
    assert found.alone == {"kind1": ["held_out: classes: accuracy"], "title0": ["held_out: classes: accuracy"]}
    assert "Loss: " not in comparison_page(found)


def test_masked_and_next_words_are_other_tasks(tmp_path: Path) -> None:
    x = [figure("words: perplexity", 9.0, percent=False)]
    names = ("bert", "roberta", "gpt")
    found = compared([stored(tmp_path / name, x, recipe=name, data="text") for name in names])
    assert [[f is not None for f in row.figures] for row in found.tables[0].rows] == [[True, True, False]]


def told_apart(tmp_path: Path, name: str, recipe: str, *changes: dict[str, Any]) -> list[tuple[str, list[bool]]]:
    """(title of a row, who has the figure) of two runs with each change; "tokenizer" is what that file has."""
    runs = []
    for i, change in enumerate(change for change in changes for _ in range(2)):
        more = dict(change)
        tokenizer = more.pop("tokenizer", "{}")
        runs.append(stored(tmp_path / str(i), [figure(name, 2.0, percent=False)], recipe=recipe, data="text", **more))
        (runs[-1] / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    found = compared(runs)
    return [(row.title, [f is not None for f in row.figures]) for table in found.tables for row in table.rows]


@pytest.mark.parametrize(
    ("name", "recipe", "change", "said"),
    [
        ("words: perplexity", "gpt", {"tokenizer": "[]"}, "NextToken of text, tokenizer "),
        ("words: accuracy", "roberta", {"tokenizer": "[]"}, "MaskedTokens of text, MaskWords share 0.4, tokenizer "),
        ("words: loss", "roberta", {"parts": {"streams.text.views.maskwords.share": 0.9}}, "MaskWords share 0.9"),
        ("patches: error", "mae", {"parts": {"objectives.patches.normalize": False}}, "normalize False"),
        ("patches: error", "mae", {"parts": {"streams.image.views.maskpatches.share": 0.5}}, "MaskPatches share 0.5"),
        ("patches: error", "mae", {"parts": {"streams.image.encoder.patch": 8}}, "patch 8"),
        ("features: mean square error", "uniter", {"parts": {"streams.regions.encoder.side": 8}}, "Regions side 8"),
    ],
)
def test_other_units_are_other_tasks(tmp_path: Path, name: str, recipe: str, change: dict[str, Any], said: str) -> None:
    """An error in other numbers, a likelihood of other tokens or with more of them hidden."""
    rows = told_apart(tmp_path, name, recipe, {}, change)
    assert [who for _, who in rows] == [[True, True, False, False], [False, False, True, True]]
    assert said in rows[1][0] and rows[0][0] != rows[1][0]
    objective = name.partition(":")[0]
    (remark, _) = compared([tmp_path / "1", tmp_path / "2"]).remarks[:2]
    assert remark.startswith(f"Runs are asked different things by the name {objective}: ") and said in remark


@pytest.mark.parametrize(
    ("name", "recipe", "changes"),
    [
        ("words: perplexity", "gpt", [{}, {"seed": 1, "batch": 7, "lr": 1.0, "parts": {"model.width": 64}}]),
        ("words: perplexity", "roberta", [{}, {"parts": {"objectives.words.weight": 0.5}}]),
        ("words: perplexity", "roberta", [{}, {"parts": {"streams.text.views.maskwords.static": True}}]),
        ("patches: error", "mae", [{"tokenizer": "{}"}, {"tokenizer": "[]"}]),
        ("patches: error", "mae", [{}, {"parts": {"streams.image.encoder.layers": 2}}]),
        ("words: CIDEr without image", "caption", [{"tokenizer": "{}"}, {"tokenizer": "[]"}]),
    ],
)
def test_what_changes_no_unit(tmp_path: Path, name: str, recipe: str, changes: list[dict[str, Any]]) -> None:
    assert told_apart(tmp_path, name, recipe, *changes) == [(name, [True] * 4)]
    assert not compared([tmp_path / "1", tmp_path / "2"]).remarks


def test_no_baseline_is_the_best(tmp_path: Path) -> None:
    names = ("words: perplexity", "words: perplexity of bigrams")
    more: dict[str, Any] = {"percent": False, "higher_is_better": False}
    runs = []
    for run, value in (("a", -4.0), ("b", -9.0)):  # all are better than chance
        figures = [figure(name, value, **more) for name in names]
        runs.append(stored(tmp_path / run, figures, recipe="gpt", data="text"))
    found = compared(runs)
    assert [(row.name, row.best) for row in found.tables[0].rows] == [(names[0], 1), (names[1], None)]


def test_figures_that_are_no_numbers(tmp_path: Path) -> None:
    """A log has NaN as Python writes it."""
    nan = float("nan")
    bad = [figure("x", nan, None, headline=True), {**figure("y", nan, None), "chance": nan}]
    runs = [stored(tmp_path / "a", [figure("x", 0.5, headline=True), figure("y", 0.4)]), stored(tmp_path / "b", bad)]
    found = compared([*runs, stored(tmp_path / "c", bad)])
    assert [row.best for row in found.tables[0].rows] == [None, None]
    assert "nan%" in comparison_table(found) and "<b>nan</b>" in comparison_page(found)


def test_a_run_shows_what_it_has(tmp_path: Path) -> None:
    """Without an evaluation, unfinished, without a step, cut off in the middle of a line."""
    full = stored(tmp_path / "full", [figure("x", 0.5)])
    fresh, begun = stored(tmp_path / "fresh", steps=0), stored(tmp_path / "begun", steps=2)
    with (begun / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"kind": "step", "st')
    found = compared([fresh, full, begun])
    text = comparison_table(found)
    assert "2 of 4: unfinished" in text and "0 of 4: unfinished" in text and text.count("never") == 2
    assert "They share no figure." in text
    assert "Loss: contrast" in comparison_page(found)


def test_of_several_objectives_each_has_its_curve(tmp_path: Path) -> None:
    two = {"objectives.a.weight": 1.0, "objectives.b.weight": 1.0}
    runs = [stored(tmp_path / name, wiring=two) for name in "xy"]
    for run in runs:
        lines = (run / "log.jsonl").read_text(encoding="utf-8").replace('"loss"', '"a/loss": 1.5, "loss"')
        (run / "log.jsonl").write_text(lines, encoding="utf-8")
    found = compared(runs)
    assert found.runs[0].losses == {"a": [(step, 1.5) for step in range(1, 5)]}


def test_wrong_runs_are_named(tmp_path: Path) -> None:
    good = stored(tmp_path / "good")
    with pytest.raises(ValueError, match="RUN: expected at least two runs, got 1"):
        compared([good])
    with pytest.raises(ValueError, match=r"RUN: expected different runs, got .*good twice"):
        compared([good, tmp_path / "good" / ".." / "good"])
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for folder, got in (("absent", "nothing there"), ("", "a folder without config.json"), ("file", "a file")):
        with pytest.raises(RunFolderError, match=f"expected the folder of a run, got {got}"):
            compared([good, tmp_path / folder])
    bad = stored(tmp_path / "bad")
    (bad / "log.jsonl").write_text('{"kind": "step", "step": 1}\n', encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"bad: expected a run that has begun, .* no start record"):
        compared([good, bad])
    with (bad / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps({"kind": "start", "parameters": 1, "environment": {}}) + "\n")
    with pytest.raises(RunFolderError, match=r"log.jsonl: expected step records with loss, .*, got"):
        compared([good, bad])
    (bad / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(RunFolderError, match="expected the settings of a run"):
        compared([good, bad])


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "other"]
    assert list(named(folders)) == ["a/run", "b/run", f"{tmp_path.name}/other"]
    assert list(named(folders[1:])) == ["run", "other"]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(stored(tmp_path / name, [figure("x", 0.5)])) for name in "ab"]
    out = tmp_path / "page.html"
    for _ in range(2):  # a page of its own may be replaced
        assert cli.main(["compare", *runs, "--out", str(out)]) == 0
    assert "held_out: x" in capsys.readouterr().out
    assert "2 runs side by side" in out.read_text(encoding="utf-8")
    other = tmp_path / "notes.html"
    other.write_text("mine", encoding="utf-8")
    for path, said in ((other, "got another file"), (tmp_path, "got a folder"), (tmp_path / "no" / "x", "written: No")):
        assert cli.main(["compare", *runs, "--out", str(path)]) == 1
        assert said in capsys.readouterr().err
    assert other.read_text(encoding="utf-8") == "mine"
    assert cli.main(["compare", runs[0], "--out", str(out)]) == 1
    assert "mmkernels compare: RUN: expected at least two runs" in capsys.readouterr().err
