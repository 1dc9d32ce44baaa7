"""`mmkernels compare` puts side by side what was measured on the same samples, and tells who learned from others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pretrain.conftest import draw
from pretrain.stored_runs import OWN, figure, grouped, stored

from mmkernels.pretrain import Config, train
from mmkernels.pretrain.data import open_data
from mmkernels.pretrain.data.filter_list import FilterList, names_digest
from mmkernels.pretrain.metrics import HeldOut
from mmkernels.pretrain.report.compare import compared, comparison_page, comparison_table
from mmkernels.pretrain.report.held_out import agree
from mmkernels.pretrain.sample_digests import digests_of
from mmkernels.pretrain.setup import open_source

Make = Callable[..., Config]


def samples(count: int = 25, **fields: str) -> dict[str, Any]:
    return {"held_out": {"samples": count, "fields": fields}}


def noted(folder: Path, held_out: dict[str, Any] | None = None, chances: dict[str, float] | None = None) -> Path:
    """A stored run whose log says which samples are held out, and with other chances of some figures."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        if record["kind"] == "start" and held_out is not None:
            record["held_out"] = held_out
        for row in record.get("figures", ()):
            row["chance"] = (chances or {}).get(row["name"], row["chance"])
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return folder


def recaptioned(pictures: Path) -> None:
    table = pictures / "captions.jsonl"
    table.write_text(table.read_text(encoding="utf-8").replace(': "a ', ': "one '), encoding="utf-8")


def redrawn(pictures: Path) -> None:
    for path in pictures.glob("*.png"):
        draw("brown", "square").save(path)


def grown(pictures: Path) -> None:
    rows = [json.dumps({"image": "red-bar.png", "caption": f"number {i}"}) for i in range(3)]
    more = [json.dumps({"image": f"{i}.png", "caption": f"a new one, {i}"}) for i in range(20)]
    for i in range(20):
        draw("red", "bar").save(pictures / f"{i}.png")
    with (pictures / "captions.jsonl").open("a", encoding="utf-8") as table:
        table.write("\n" + "\n".join([*rows, *more]))


@pytest.mark.parametrize("change", [recaptioned, redrawn, grown])
def test_data_that_have_changed_are_other_data(change: Callable[[Path], None], tiny: Make, pictures: Path) -> None:
    """Other texts, other pictures under the same names, more rows: the settings are those of before."""
    base = pictures.parent
    settings: dict[str, Any] = {"steps": 1, "eval_fraction": 0.5, "checkpoint_every": 0}
    before = [train(tiny(run=base / name, **settings)).folder.path for name in ("a", "b")]
    change(pictures)
    after = [train(tiny(run=base / name, **settings)).folder.path for name in ("c", "d")]
    found = compared([*before, *after])
    data = f"folder:{pictures}"
    counts = [run.start["held_out"]["held_out"]["samples"] for run in found.runs]
    assert grouped(found) == [
        (f"{data}, {counts[0]} samples, held out as in a", ["a", "b"]),
        (f"{data}, {counts[2]} samples, held out as in c", ["c", "d"]),
    ]
    groups = f"{counts[0]} samples, a, b; {counts[2]} samples, c, d."
    said = f"hold out different samples of {data}, though by the same settings: {groups}"
    assert f"Runs {said}" in found.remarks
    assert said in comparison_table(found) and said in comparison_page(found)
    alone = compared([before[0], after[0]])
    assert not alone.tables and set(alone.alone) == {"a", "c"}


def test_figures_stay_those_of_the_samples_that_they_are_of(tiny: Make, pictures: Path) -> None:
    """Of a finished run that was resumed, with nothing to do, after the data had changed."""
    base = pictures.parent
    settings: dict[str, Any] = {"steps": 1, "eval_fraction": 0.5}
    one, other = (train(tiny(run=base / name, **settings)).folder.path for name in ("one", "other"))
    redrawn(pictures)
    train(tiny(run=other, resume=True, **settings))
    assert grouped(compared([one, other])) == [(f"folder:{pictures}", ["one", "other"])]


def test_samples_are_told_field_by_field(pictures: Path) -> None:
    """Whatever else is read: pictures with captions are named otherwise than rows of a table."""
    rows = [json.loads(line) for line in (pictures / "captions.jsonl").read_text(encoding="utf-8").splitlines()]

    def opened(change: Callable[[dict[str, Any]], object], *fields: str) -> dict[str, Any]:
        text = "\n".join(json.dumps(change({**row, "kind": row["caption"].split()[1]}) or row) for row in rows)
        (pictures / "captions.jsonl").write_text(text, encoding="utf-8")
        labels = [field for field in fields if field == "kind"]
        own: dict[str, Any] = {"eval_fraction": 0.5, "held_out_by": ("image", "text")}
        data = open_data(f"folder:{pictures}", fields=fields, labels=labels, **own)
        collator: Any = None
        return {
            name: digests_of(HeldOut(name, source, collator, collator, data.train, limit=10))
            for name, source in data.held_out.items()
        }

    pairs = opened(dict, "image", "text")
    assert pairs["held_out"]["samples"] == 10 and set(pairs["held_out"]["fields"]) == {"image", "text"}
    kinds = opened(dict, "image", "kind")
    assert agree(pairs, kinds) and agree(kinds, opened(dict, "kind", "text"))
    other = opened(lambda row: {**row, "kind": "x" + row["kind"]}, "image", "kind")
    assert agree(pairs, other) and not agree(kinds, other)


def test_fine_tunes_that_read_other_fields_are_compared(tmp_path: Path) -> None:
    x = [figure("image: kind by a linear probe", 0.5)]
    both = noted(stored(tmp_path / "both", x, **OWN), samples(image="1", text="2"))
    label = noted(stored(tmp_path / "label", x, **OWN), samples(image="1", kind="3"))
    other = noted(stored(tmp_path / "other", x, **OWN), samples(image="1", kind="4"))
    fewer = noted(stored(tmp_path / "fewer", x, **OWN), samples(24, image="1"))
    assert grouped(compared([both, label])) == [("folder:x", ["both", "label"])]
    assert not compared([both, label]).remarks
    (table,) = compared([both, label, other, fewer]).tables
    assert [run.name for run in table.runs] == ["both", "label"]
    elsewhere = noted(stored(tmp_path / "elsewhere", x, **OWN), {"validation": samples(3)["held_out"]})
    assert grouped(compared([both, elsewhere])) == [("folder:x", ["both", "elsewhere"])], "they share no split"


def test_runs_whose_log_does_not_say_it(tmp_path: Path) -> None:
    """Of an earlier version: settings and chance tell."""
    names = ("image → text R@1", "text → image R@1", "loss")
    x = [figure(name, 0.5, headline=True) for name in names]
    now = [noted(stored(tmp_path / name, x, **OWN), samples(image="1")) for name in "ab"]
    same = stored(tmp_path / "same", x, **OWN)
    said = "The log of same does not say which samples were held out: told by settings and chance alone."
    found = compared([*now, same])
    assert grouped(found) == [("folder:x", ["a", "b", "same"])] and found.remarks == [said]
    assert all(figure is not None for row in found.tables[0].rows for figure in row.figures)

    partly = noted(stored(tmp_path / "partly", x, **OWN), chances={names[0]: 0.2})
    rows = {row.name: [f is not None for f in row.figures] for row in compared([*now, partly]).tables[0].rows}
    assert rows == {names[0]: [True, True, False], names[1]: [True] * 3, names[2]: [True] * 3}
    other = noted(stored(tmp_path / "other", x, **OWN), chances=dict.fromkeys(names, 0.2))
    found = compared([now[0], other])
    assert not found.tables and set(found.alone) == {"a", "other"}
    how = "though by the same settings: 25 samples, a; other."
    assert found.remarks[0] == f"Runs hold out different samples of folder:x, {how}"
    along = [stored(tmp_path / name, x) for name in ("emoji", "too")]
    assert not compared(along).remarks, "what comes along does not change"


def test_lists_of_samples_to_leave_out(tiny: Make, tmp_path: Path) -> None:
    """Each run keeps its list by the same name; they are told by their content."""
    source, runs = open_source(tiny()).train, []
    for name, count in (("one", 2), ("two", 5), ("three", 2)):
        path = tmp_path / name / "drop.jsonl"
        path.parent.mkdir()
        dropped = "".join(
            json.dumps({"split": "train", "index": i, "name": source.logged_as(i), "reasons": ["mine"]}) + "\n"
            for i in range(count)
        )
        head = FilterList({"data": tiny().data, "samples": len(source), "names": names_digest(source)}, ()).text()
        path.write_text(head.rstrip("\n") + "\n" + dropped, encoding="utf-8")
        config = tiny(run=tmp_path / f"run-{name}", filter=path, steps=1, eval_every=0, checkpoint_every=0)
        runs.append(train(config).folder.path)
    found = compared(runs)
    one, two, three = found.settings["filter"]
    assert one == three != two and all(str(each).startswith("filter.jsonl (") for each in (one, two))
    left = len(source)
    assert [run.summary()["training samples"] for run in found.runs] == [str(left - n) for n in (2, 5, 2)]
    assert grouped(found) == [(tiny().data, ["run-one", "run-two", "run-three"])], "the held-out samples are the same"
    assert "filter" not in compared([runs[0], runs[2]]).settings


def test_recipes_of_one_name(tmp_path: Path) -> None:
    """Files of your own are told by their content."""
    runs = []
    for name, more in (("a", ""), ("b", "# other\n"), ("c", "")):
        file = tmp_path / name / "mine.py"
        file.parent.mkdir()
        file.write_text(f"from mmkernels.pretrain.recipes.clip import RECIPE\n{more}", encoding="utf-8")
        run = stored(tmp_path / f"run-{name}", [figure("x", 0.5)], recipe=str(file), data="emoji")
        (run / "mine.py").write_bytes(file.read_bytes())
        runs.append(run)
    found = compared(runs)
    a, b, c = found.settings["recipe"]
    assert a == c != b and str(a).startswith("mine.py (")
    assert found.remarks[0] == f"The runs have different recipes: mine of {a}, mine of {b}."
    alike = compared([runs[0], runs[2]])
    assert not alike.remarks and "recipe" not in alike.settings
