"""Data reports: every fault of a salted folder is found, and none in what is clean; filter lists do as they say."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pretrain.salted import FRACTION, Salted, names, pixels
from pretrain_data import pairs, shard

from mmkernels.cli import main as command
from mmkernels.pretrain import Config, load_model, train
from mmkernels.pretrain.cli import parse
from mmkernels.pretrain.data import open_data
from mmkernels.pretrain.data_report import DataReport, data_report
from mmkernels.pretrain.data_report.kinds import KINDS
from mmkernels.pretrain.data_report.pictures import near_hashes
from mmkernels.pretrain.data_report.report import Report, examine
from mmkernels.pretrain.data_report.texts import boilerplate
from mmkernels.pretrain.data_report.weighing import gain
from mmkernels.pretrain.setup import open_source

EVERY = ",".join(KINDS)


def written(folder: Path, rows: list[dict[str, object]], name: str = "captions.jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def pictured(folder: Path, captions: list[object], first: int = 0) -> Path:
    """A folder of different pictures."""
    folder.mkdir(exist_ok=True)
    for i in range(len(captions)):
        Image.fromarray(pixels(first + i)).save(folder / f"{i}.png")
    return written(folder, [{"image": f"{i}.png", "caption": each} for i, each in enumerate(captions)])


def found(report: Report, kind: str) -> set[str]:
    return names(iter(report.findings), kind)


@pytest.fixture(scope="module")
def salted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Salted, Report, Path]:
    folder = tmp_path_factory.mktemp("salted")
    faulty = Salted(folder / "data <b>")
    out = folder / "report"
    options = DataReport(f"folder:{faulty.folder}", eval_fraction=FRACTION, drop=(EVERY,), out=out, batch=8, tokens=400)
    return faulty, data_report(options), out


@pytest.mark.parametrize("kind", KINDS)
def test_every_fault_is_found_and_no_other(kind: str, salted: tuple[Salted, Report, Path]) -> None:
    faulty, report, _ = salted
    assert faulty.faults[kind], "the folder has such a fault"
    assert found(report, kind) == faulty.faults[kind]


def test_findings_name_what_is_repeated(salted: tuple[Salted, Report, Path]) -> None:
    _, report, _ = salted
    for finding in report.findings:
        if finding.kind == "duplicates":
            split, index = finding.of or ("", -1)
            assert report.data.splits[split].name(index) == finding.name.replace("copy", "clean")
        if finding.kind == "leaked":
            assert finding.split == "train" and (finding.of or ("", 0))[0] == "held_out"


def test_the_page(salted: tuple[Salted, Report, Path]) -> None:
    faulty, report, out = salted
    page = (out / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page), "nothing is loaded from elsewhere"
    assert "data &lt;b&gt;" in page and "data <b>" not in page
    assert "&lt;b&gt;kite&lt;/b&gt; &amp;amp; sea" in page, "captions are text"
    for kind, those in faulty.faults.items():
        assert f"<code>{kind}</code>" in page
        assert any(name in page for name in those)
    figures = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert figures["counts"]["empty"]["train"] == 7
    assert figures["coverage"]["train"]["samples"] == len(report.data.train)
    assert figures["sizes"]["image: width in pixels"]["train"]["most"] == 150, "as stored, not as decoded"


def test_training_reads_the_list(salted: tuple[Salted, Report, Path]) -> None:
    """All faulty samples are gone, the clean ones there, and nothing counts as broken."""
    faulty, report, out = salted
    config = Config(data=f"folder:{faulty.folder}", eval_fraction=FRACTION, filter=out / "drop.jsonl", max_broken=0.0)
    data = open_source(config)
    left = {data.train.name(i) for i in range(len(data.train))}
    held_out = {data.held_out["held_out"].name(i) for i in range(len(data.held_out["held_out"]))}
    faults = set.union(*faulty.faults.values())
    assert left == {str(row["image"]) for row in faulty.rows if "image" in row} - faults - held_out - {
        str(row["image"]) for row in faulty.rows if "image" in row and not str(row["caption"] or "").strip(" []',")
    }
    assert held_out == {report.data.splits["held_out"].name(i) for i in range(len(report.data.splits["held_out"]))}
    assert set(faulty.clean) - held_out <= left
    assert len(data.held_out["held_out"].read(range(len(held_out)))) == len(held_out) - 1
    assert not len(data.train.broken)
    with pytest.raises(ValueError, match="could not be read"):
        open_source(Config(data=config.data, eval_fraction=FRACTION, max_broken=0.0))


@pytest.mark.parametrize("source", ["emoji", "scenes"])
def test_no_false_duplicates_in_what_comes_along(source: str) -> None:
    """Two vendors' drawings of one thing are alike, and so are scenes, but no copies."""
    report = examine(DataReport(source, recipe="clip", limit=400, vocabulary=300))
    kinds = ("duplicates", "near-duplicates", "leaked", "empty", "boilerplate", "long", "script", "broken")
    assert not [finding for finding in report.findings if finding.kind in kinds]
    assert not found(report, "blank"), "a square on nothing is a drawing"
    assert report.data.partial and report.points is not None


def test_near_hashes_are_those_of_all_pairs() -> None:
    """Against brute force, around the limit of seven bits."""
    draws = np.random.default_rng(0)
    hashes = draws.integers(0, 2**64, 400, dtype=np.uint64)
    hashes[200:] = [_turned(int(each), draws.choice(64, k % 12, replace=False)) for k, each in enumerate(hashes[:200])]
    expected = [
        [i, j] for i in range(400) for j in range(i + 1, 400) if bin(int(hashes[i]) ^ int(hashes[j])).count("1") <= 7
    ]
    assert near_hashes(hashes).tolist() == expected and len(expected) > 100
    assert near_hashes(hashes[:0]).shape == (0, 2)
    assert near_hashes(np.zeros(3, np.uint64)).tolist() == [[0, 1], [0, 2], [1, 2]]


def _turned(number: int, bits: np.ndarray) -> int:
    for bit in bits.tolist():
        number ^= 1 << bit
    return number


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("DSC_0042", "a file name"),
        ("photos/beach.jpeg", "a file name"),
        ("my picture (3).PNG", "a file name"),
        ("beach (3).png", "a file name"),
        ("www.example.org", "a link"),
        ("a kite&nbsp;", "markup"),
        ("I <3 kites", ""),
        ("royalty-free kites", "a phrase of picture agencies"),
        ("stock of photos", ""),
        ("Picture of", "nothing said"),
        ("an image of a kite", ""),
        ("photo 12", "nothing said"),
        ("copyright", ""),
        ("p 7", ""),
        ("N/A", "nothing said"),
    ],
)
def test_boilerplate(text: str, what: str) -> None:
    assert boilerplate(text) == what


def test_packing_gains_what_padding_wastes() -> None:
    """Worked by hand: a batch of two is padded to its longest, and packs of ten hold 7 + 3."""
    gained = gain(np.array([7, 3, 0, 7, 3, 12]), 1, 10)
    assert gained is not None and (gained.tokens, gained.padded, gained.packed, gained.packs) == (32, 32, 32, 3)
    assert (gained.own_packs, gained.padding, gained.unused, gained.saved) == (1, 0.0, 0.0, 0.0)
    whole = gain(np.array([8, 2]), 2, 10)
    assert whole is not None and (whole.padded, whole.packed) == (16, 10) and whole.saved == pytest.approx(0.375)
    assert gain(np.zeros(3, np.int64), 2, 10) is None


def test_texts_without_pictures(tmp_path: Path) -> None:
    """Near-duplicates and leaks of passages; short texts and other numbers are no near-duplicates."""
    long = "the quick brown fox jumps over the lazy dog while the sleepy cat watches from the garden wall, number 7"
    rows = [long, long.replace("lazy", "crazy"), long.replace("7", "8"), "woman in a wheelchair", "man in a wheelchair"]
    rows += [long.upper() + "!"]
    folder = written(tmp_path / "texts", [{"caption": text} for text in rows])
    report = examine(DataReport(f"folder:{folder}", recipe="gpt", eval_fraction=0.0))
    assert found(report, "near-duplicates") == {"captions.jsonl: line 2"}
    assert found(report, "duplicates") == {"captions.jsonl: line 6"}
    assert not found(report, "same-picture") and not found(report, "leaked")


def test_labels_tell_samples_apart(tmp_path: Path) -> None:
    folder = pictured(tmp_path / "data", ["a", "b"])
    rows = [{"image": "0.png", "question": "what?", "answer": answer} for answer in ("cat", "dog", "cat")]
    written(folder, rows)
    options = DataReport(f"folder:{folder}", recipe="vqa", without=("text",), labels=("answer",), eval_fraction=0.0)
    report = examine(options)
    assert found(report, "duplicates") == {"captions.jsonl: line 3"}
    assert found(report, "same-picture") == {"captions.jsonl: line 2"}
    assert report.tables["classes"]["answer"]["counts"] == {"cat": {"train": 2}, "dog": {"train": 1}}
    with pytest.raises(ValueError, match="without: expected some of the streams image, question, text, got 'sound'"):
        examine(dataclasses.replace(options, without=("sound",)))
    with pytest.raises(ValueError, match="recipe: expected one, whose streams are meant"):
        dataclasses.replace(options, recipe=None)


def test_shards(tmp_path: Path) -> None:
    """What cannot be read is found by its reason, in a mixture by the set's name."""
    Image.fromarray(pixels(99)).save(tmp_path / "fine.png")
    fine = (tmp_path / "fine.png").read_bytes()
    files = {"b.png": b"broken", "b.txt": b"a kite", "e.png": fine, "e.txt": b" ", "n.png": fine, "?": b"no key"}
    shard(tmp_path / "a.tar", pairs(12) | files)
    alone = examine(DataReport(f"webdataset:{tmp_path / 'a.tar'}"))
    assert found(alone, "broken") == {"a.tar/b", "a.tar/n", "a.tar/?"}
    assert found(alone, "empty") == {"a.tar/e"}
    other = pictured(tmp_path / "other", ["one", "two", "three"])
    source = f"folder:{other}::webdataset:{tmp_path / 'a.tar'}"
    options = DataReport(source, recipe="clip", drop=("broken,empty",), out=tmp_path / "r", vocabulary=300)
    mixed = data_report(options)
    assert {name.removeprefix("a.tar: ") for name in found(mixed, "broken")} == found(alone, "broken")
    assert not open_source(Config(data=source, filter=tmp_path / "r/drop.jsonl", max_broken=0.0)).train.broken.reasons


def test_a_set_mixed_with_itself_has_no_duplicates(tmp_path: Path) -> None:
    """It is read once, and a sample that is dropped is dropped in both places."""
    folder = pictured(tmp_path / "data", [f"thing {i}" for i in range(8)] + ["..."])
    source = f"folder:{folder}::{folder}"
    options = DataReport(source, eval_fraction=0.0, drop=("empty",), out=tmp_path / "out")
    report = data_report(options)
    assert not found(report, "duplicates")
    assert found(report, "empty") == {"data: 8.png"}
    train = open_source(Config(data=source, eval_fraction=0.0, filter=tmp_path / "out/drop.jsonl")).train
    assert [train.logged_as(i) for i in range(len(train))] == [
        f"{part}: {i}.png" for part in ("data", "data (2)") for i in range(8)
    ]
    assert train.shares is not None and len(train.shares) == 16
    np.testing.assert_array_equal(train.concepts[:8], train.concepts[8:])


def test_one_sample_and_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = pictured(tmp_path / "one", ["ein Apfel 🍎"])
    report = data_report(DataReport(f"folder:{one}", eval_fraction=0.0, out=tmp_path / "r"))
    assert report.points is None and not report.findings
    assert "fewer than three samples" in (tmp_path / "r/report.html").read_text(encoding="utf-8")
    none = written(tmp_path / "none", [])
    assert command(["data-report", f"folder:{none}", "--out", str(tmp_path / "n")]) == 1
    assert "expected at least one image with a caption, got no rows" in capsys.readouterr().err
    assert not (tmp_path / "n").exists()


def test_everything_broken(tmp_path: Path) -> None:
    folder = written(tmp_path / "data", [{"image": f"{i}.png", "caption": f"thing {i}"} for i in range(5)])
    report = data_report(DataReport(f"folder:{folder}", eval_fraction=0.0, out=tmp_path / "r", drop=("broken",)))
    assert len(found(report, "broken")) == 5
    with pytest.raises(ValueError, match="expected samples left to train on"):
        open_source(Config(data=f"folder:{folder}", filter=tmp_path / "r/drop.jsonl", eval_fraction=0.0))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--drop", "leaked,dupes"], "drop: expected some of broken, empty"),
        (["--limit", "0"], "limit: expected at least 1, got 0"),
        (["--max-tokens", "2"], "max_tokens: expected at least 3"),
        (["--eval-fraction", "1"], "eval_fraction: expected 0 <= eval_fraction < 1"),
    ],
)
def test_options_that_cannot_be_are_refused(argv: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        command(["data-report", "emoji", *argv])
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_only_reports_are_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = pictured(tmp_path / "data", ["a kite", "two kites", "three kites"])
    out = tmp_path / "mine"
    out.mkdir()
    (out / "report.html").write_text("mine", encoding="utf-8")
    argv = ["data-report", f"folder:{data}", "--out", str(out)]
    assert command(argv) == 1
    assert "expected a new folder, or that of an earlier report" in capsys.readouterr().err
    assert (out / "report.html").read_text(encoding="utf-8") == "mine"
    argv[-1] = str(tmp_path / "new")
    assert command(argv) == 0 and command(argv) == 0, "an earlier report is"
    assert command([*argv[:-1], str(data / "0.png")]) == 1


def test_the_same_data_give_the_same_report(tmp_path: Path) -> None:
    pages = []
    for name in ("a", "b"):
        options = DataReport("emoji", limit=30, out=tmp_path / name, vocabulary=300)
        data_report(options)
        pages.append((tmp_path / name / "report.html").read_text(encoding="utf-8").replace(str(options.out), ""))
    assert pages[0] == pages[1]


def test_embeddings_of_a_run(tiny: Callable[..., Config]) -> None:
    """Its tokenizer counts, and its embeddings are the points: the components that numpy finds in them."""
    config = tiny(steps=1, eval_every=0)
    train(config)
    report = examine(DataReport(str(config.data), eval_fraction=0.2, run=config.folder))
    assert report.points is not None and report.points.what == "the run's embeddings of image"
    model = load_model(config.folder)
    x = model.embed("image", [sample.values["image"] for sample in report.points.samples]).double().numpy()
    centred = x - x.mean(0)
    _, values, axes = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs(report.points.xy), np.abs(centred @ axes[:2].T), atol=1e-5)
    assert report.points.share == pytest.approx((values[:2] ** 2).sum() / (values**2).sum(), abs=1e-5)
    with pytest.raises(ValueError, match="holds no run"):
        examine(DataReport(str(config.data), run=config.folder / "nowhere"))


def test_interrupted_is_nothing_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mmkernels.pretrain.data_report.report.scan", interrupt)
    assert command(["data-report", "emoji", "--limit", "5", "--vocabulary", "300", "--out", str(tmp_path / "r")]) == 130
    assert "nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_default_folders() -> None:
    assert DataReport("emoji").folder == Path("data-reports/emoji")
    assert DataReport("folder:/a/b c/").folder == Path("data-reports/b-c")
    assert DataReport("folder:写真").folder == DataReport("hf:写真").folder == Path("data-reports/写真")
    assert DataReport("emoji::./mine").folder == Path("data-reports/emoji=mine")
    assert DataReport("webdataset:x/*.tar").folder == Path("data-reports/tar")


def test_a_part_of_the_data(tmp_path: Path) -> None:
    data = pictured(tmp_path / "data", [f"thing {i}" for i in range(20)])
    report = data_report(DataReport(f"folder:{data}", eval_fraction=0.0, limit=5, out=tmp_path / "r"))
    assert report.tables["coverage"]["train"] == {"samples": 20, "read": 5, "fields": {"image": 5, "text": 5}}
    assert "Only a part was read" in (tmp_path / "r/report.html").read_text(encoding="utf-8")
    assert open_data(f"folder:{data}", eval_fraction=0.0).train.name(0) == "0.png"


def test_a_list_for_what_is_held_out_by_other_fields(pictures: Path, tmp_path: Path) -> None:
    source, by = f"folder:{pictures}", {"eval_fraction": 0.2, "held_out_by": ("image",)}
    data_report(DataReport(source, **by, out=tmp_path / "r", drop=("duplicates",)))  # type: ignore[arg-type]
    config = Config(data=source, filter=tmp_path / "r" / "drop.jsonl", **by)  # type: ignore[arg-type]
    kept = open_source(config).train
    assert {kept.name(i) for i in range(len(kept))} <= {path.name for path in pictures.glob("*.png")}
    with pytest.raises(
        ValueError, match=r"got one of 2\d of folder.* \(fields image, text; eval_fraction 0\.2 by image\)"
    ):
        open_source(Config(data=source, filter=config.filter, eval_fraction=0.2))


def test_the_command_that_trains_is_taken(tmp_path: Path) -> None:
    """As printed: with all that decides which samples there are."""
    folder = pictured(tmp_path / "data", [f"thing {i}" for i in range(20)])
    rows = [{"image": f"{i}.png", "caption": f"thing {i}", "kind": "a"} for i in range(20)]
    written(folder, rows)
    options = DataReport(f"folder:{folder}", eval_fraction=0.3, labels=("kind",), drop=("blank",), out=tmp_path / "r")
    words = shlex.split(data_report(options).training)
    assert words[:2] == ["mmkernels", "pretrain"] and words[-4:] == ["--labels", "kind", "--eval-fraction", "0.3"]
    assert len(open_source(parse(words[2:])).train) == len(examine(options).data.train)

    written(folder, [{**row, "question": "what?"} for row in rows])
    asked = examine(dataclasses.replace(options, labels=()))
    assert asked.training.startswith("mmkernels pretrain --recipe RECIPE --data ")
    assert asked.training.endswith("(a recipe that reads image, text, question; for others say so here)")
    named = examine(dataclasses.replace(options, recipe="clip"))
    assert named.training.startswith("mmkernels pretrain --recipe clip --data ")
    assert examine(DataReport("emoji", limit=20)).training.startswith("mmkernels pretrain --data emoji")


def test_one_of_those_alike_stays(tmp_path: Path) -> None:
    """Where the first of them is left out for itself, the next one is the first."""
    captions = ["a heron by the river", "IMG_0001.jpg", "a kite over the beach", "a kite", "the same kite"]
    folder = pictured(tmp_path / "data", captions)
    for i in (3, 4):
        (folder / f"{i}.png").write_bytes((folder / "1.png").read_bytes())
    source = f"folder:{folder}"
    options = DataReport(source, eval_fraction=0.0, drop=("boilerplate,same-picture",), out=tmp_path / "r")
    report = data_report(options)
    assert found(report, "same-picture") == {"3.png", "4.png"}
    assert [entry.name for entry in report.filter_list().dropped] == ["1.png", "4.png"]
    alone = dataclasses.replace(options, drop=("same-picture",), out=tmp_path / "alone")
    assert [entry.name for entry in data_report(alone).filter_list().dropped] == ["3.png", "4.png"]


def test_what_nearly_repeats_another_text_of_a_picture_has_that_picture_too(tmp_path: Path) -> None:
    long = "two herons stand by the river in the early morning while the fog lifts slowly"
    folder = pictured(tmp_path / "data", ["a bird", long, f"{long} again", "something else"])
    for i in (1, 2):
        (folder / f"{i}.png").write_bytes((folder / "0.png").read_bytes())
    options = DataReport(f"folder:{folder}", eval_fraction=0.0, drop=("same-picture",), out=tmp_path / "r")
    report = data_report(options)
    assert found(report, "near-duplicates") == {"2.png"}
    assert found(report, "same-picture") == {"1.png", "2.png"}
    assert [entry.name for entry in report.filter_list().dropped] == ["1.png", "2.png"]
