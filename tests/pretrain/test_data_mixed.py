"""Several data sets as one: concepts kept apart, classes merged by name, runs that resume exactly."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pretrain.conftest import draw
from pretrain.test_resume import assert_same_end

from mmkernels.pretrain import Config, main, train
from mmkernels.pretrain.data import (
    BatchSampler,
    BrokenImageError,
    BrokenLog,
    Collator,
    Data,
    Mixed,
    Regions,
    Sample,
    Source,
    Text,
    TooManyBrokenError,
    TrainLoader,
    mix,
    open_data,
)
from mmkernels.pretrain.encoders import HashedWords
from mmkernels.pretrain.journal import Journal
from mmkernels.pretrain.recipe import Stream
from mmkernels.pretrain.setup import open_source, texts
from mmkernels.pretrain.tokenizer import TextTokenizer


class Labelled(Source):
    """Samples with a text, a label and tagged regions; those in `faults` cannot be read."""

    fields = ("text", "kind", "regions")

    def __init__(self, prefix: str, size: int, kinds: tuple[str, ...], faults: tuple[int, ...] = ()) -> None:
        self.prefix, self.classes, self.faults = prefix, {"kind": kinds, "tag": kinds}, faults
        self.concepts = np.arange(size) // 2
        self.broken = BrokenLog(size, 0.3)

    def __getitem__(self, index: int) -> Sample:
        if index in self.faults:
            raise BrokenImageError("cannot be read")
        return Sample(self.peek(index), int(self.concepts[index]), self.name(index))

    def name(self, index: int) -> str:
        return f"row {index}"

    def peek(self, index: int) -> dict[str, Any]:
        kind = index % len(self.classes["kind"]) if index else -100  # the first has no label
        regions = Regions(np.zeros((2, 4), np.float32), np.zeros((2, 2, 2, 3), np.uint8), np.array([kind, -100]))
        return {"text": Text((f"{self.prefix} {index}",)), "kind": kind, "regions": regions}


def test_fields_and_classes_are_merged_by_name_and_concepts_kept_apart() -> None:
    a, b = Labelled("a", 6, ("cat", "dog")), Labelled("b", 9, ("bird", "dog", "cat"))
    b.fields = (*b.fields, "video")
    mixed = Mixed({"a": a, "b": b})
    assert mixed.fields == ("text", "kind", "regions", "video") and len(mixed) == 15
    assert mixed.classes == {"kind": ("cat", "dog", "bird"), "tag": ("cat", "dog", "bird")}
    assert mixed.concepts.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7]
    for i, (source, own) in enumerate([(a, i) for i in range(6)] + [(b, i) for i in range(9)]):
        for values, before in ((mixed[i].values, source[own].values), (mixed.peek(i), source.peek(own))):
            old = before["kind"]
            name = source.classes["kind"][old] if old >= 0 else None
            now = values["kind"]
            assert (mixed.classes["kind"][now] if now >= 0 else None) == name
            assert values["regions"].tags.tolist() == [now, -100]
            assert values["text"] == before["text"] and set(values) == set(before)
        assert mixed[i].concept == mixed.concepts[i] and mixed.name(i) == mixed[i].name == f"row {own}"
    with pytest.raises(IndexError, match="expected 0 to 14, got 15"):
        mixed[15]


def test_a_set_mixed_with_itself_keeps_its_concepts() -> None:
    a = Labelled("a", 6, ("cat",))
    mixed = Mixed({"a": a, "a (2)": a, "b": Labelled("b", 2, ("cat",))}, (1, 1, 1))
    assert mixed.concepts.tolist() == [0, 0, 1, 1, 2, 2] * 2 + [3, 3]


def test_held_out_sets_share_the_numbers_of_their_training_set() -> None:
    a, b = Labelled("a", 6, ("cat", "dog")), Labelled("b", 4, ("dog", "cow"))
    unseen = Labelled("c", 10, ("dog", "cat", "emu"))  # of a's concepts, and two more; a class that training lacks
    data = mix({"a": Data(a, {"held_out": unseen}), "b": Data(b, {"x": b, "y": b})})
    assert list(data.held_out) == ["a: held_out", "b: x", "b: y"]
    assert data.held_out["a: held_out"].concepts.tolist() == unseen.concepts.tolist()
    assert data.train.concepts.tolist() == [0, 0, 1, 1, 2, 2, 5, 5, 6, 6], "beyond those of the held-out set"
    kinds = [data.held_out["a: held_out"][i].values["kind"] for i in (1, 2, 3)]
    assert kinds == [0, -100, 1]  # cat, emu, dog
    assert data.held_out["b: x"][1].values["kind"] == data.train.classes["kind"].index("cow")
    twice = Data(a, {"held_out": unseen})
    assert list(mix({"a": twice, "a (2)": twice}).held_out) == ["a: held_out"], "evaluated once"
    with pytest.raises(ValueError, match="data: expected samples in every set, got none in b"):
        Mixed({"a": a, "b": Labelled("b", 0, ())})


def test_each_set_records_its_own_broken_samples() -> None:
    a, b = Labelled("a", 6, ("cat",), faults=(2,)), Labelled("a: b", 4, ("cat",), faults=(2, 3))
    mixed = Mixed({"a": a, "a: b": b})
    found = mixed.read_some(range(10))
    assert found.items == [0, 1, 3, 4, 5, 6, 7] and set(found.broken) == {"a: row 2", "a: b: row 2", "a: b: row 3"}
    with pytest.raises(TooManyBrokenError, match="2 of 4 samples"):  # b's limit of 30%, which the mixture is below
        mixed.read(range(10))
    assert list(a.broken.reasons) == ["row 2"] and list(b.broken.reasons) == ["row 2", "row 3"]
    assert len(mixed.broken) == 3 and mixed.broken.total == 10 and "a: b: row 3" in mixed.broken.reasons


def test_batches_are_the_same_with_any_number_of_workers() -> None:
    def batches(workers: int) -> list[Any]:
        a, b = Labelled("a", 40, ("cat",)), Labelled("b", 12, ("dog", "cat"), faults=(5,))
        mixed = Mixed({"a": a, "b": b}, (1, 1))
        tokenizer = TextTokenizer.train(texts(mixed, ["text"]), 300)
        collator = Collator({"text": Stream(HashedWords())}, tokenizer, ("kind",))
        loader = TrainLoader(mixed, BatchSampler(mixed.concepts, 10, 1, mixed.shares), collator, workers=workers)
        return list(islice(loader, 12))

    for one, two in zip(batches(0), batches(2), strict=True):
        assert one.numbers == two.numbers and one.names == two.names and one.state == two.state
        assert torch.equal(one.labels["kind"], two.labels["kind"]) and torch.equal(one.concepts, two.concepts)
        assert torch.equal(one["text"].tokens, two["text"].tokens)


def test_the_tokenizer_reads_each_set_by_its_share() -> None:
    mixed = Mixed({"a": Labelled("a", 30_000, ("cat",)), "b": Labelled("b", 200, ("cat",))}, (1, 1))
    found = Counter(text.split()[0] for text in texts(mixed, ["text"]))
    assert found == {"a": 5000, "b": 200}


# ------------------------------------------------------------------------------------------------ opened


def folder(
    path: Path, colours: Sequence[str], shapes: Sequence[str], more: Callable[[str, str], dict[str, str]]
) -> Path:
    path.mkdir()
    rows = []
    for colour in colours:
        for shape in shapes:
            draw(colour, shape).save(path / f"{colour}-{shape}.png")
            row = {"image": f"{colour}-{shape}.png", "caption": f"a {colour} {shape}"}
            rows.append(json.dumps(row | more(colour, shape)))
    (path / "captions.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return path


@pytest.fixture
def two(tmp_path: Path) -> str:
    """Twelve pictures with their colours, and eight with their shapes and colours."""
    a = folder(
        tmp_path / "a", ("red", "green", "blue"), ("circle", "cross", "bar", "frame"), lambda c, s: {"colour": c}
    )
    b = folder(tmp_path / "b", ("blue", "black"), ("circle", "square", "bar", "frame"), lambda c, s: {"shape": s})
    return f"folder:{a}::{b}"


def test_names_with_colons_open_a_mixture(two: str) -> None:
    fields = ("image", "text", "colour", "shape")
    data = open_data(two, weights=(1, 3), fields=fields, labels=("colour", "shape"), resolution=8, eval_fraction=0.3)
    train = data.train
    assert isinstance(train, Mixed)
    assert list(train.parts) == ["a", "b"]
    assert set(train.fields) == set(fields) and "shape" not in train.parts["a"].fields
    assert train.classes["colour"] == ("blue", "green", "red")
    assert list(data.held_out) == ["a: held_out", "b: held_out"]
    assert train.shares.of == (Fraction(1, 4), Fraction(3, 4))
    second = two.partition("::")[2]
    again = open_data(f"{second}::{second}/../b", fields=("image", "text")).train
    assert isinstance(again, Mixed) and len(again.parts) == 2
    own = len(again) // 2
    assert again.concepts[:own].tolist() == again.concepts[own:].tolist()


def test_what_cannot_be_mixed_is_refused(two: str, tmp_path: Path) -> None:
    for weights, message in [
        ((1,), "data_weights: expected one for each of .*, got 1 for"),
        ((1, 0), "data_weights: expected positive numbers, got 1 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_data(two, weights=weights)
    with pytest.raises(
        ValueError, match="data_weights: expected several data sets with :: in between, got 1 for emoji"
    ):
        open_data("emoji", weights=(1,))
    with pytest.raises(ValueError, match=r"expected a folder, or an existing table, or one of emoji, .*; got emojis"):
        open_data("emoji::emojis")
    for name in ("emoji::", "::emoji", "emoji::::text"):
        with pytest.raises(ValueError, match="data: expected the names of data sets around '::'"):
            open_data(name)
    with pytest.raises(ValueError, match=r"captions.jsonl: expected some of the columns 'audio', got \['image'"):
        open_data(two, fields=("audio",))
    with pytest.raises(ValueError, match="data_weights: expected positive"):
        Config(data=two, data_weights=(1.0, float("nan")))


HEARD = """
from mmkernels.pretrain.encoders import Patches, Spectrogram
from mmkernels.pretrain.objectives import Contrast
from mmkernels.pretrain.recipe import Recipe, Stream

RECIPE = Recipe(
    "Sounds and pictures",
    source="mine",
    data="speech::scenes",
    streams={"image": Stream(Patches()), "audio": Stream(Spectrogram())},
    objectives={"contrast": Contrast("image", "audio")},
    settings={"data_weights": (2.0, 1.0)},
)
"""


def test_a_recipe_says_what_a_set_lacks(
    two: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    heard = tmp_path / "heard.py"
    heard.write_text(HEARD, encoding="utf-8")
    with caplog.at_level(logging.WARNING, "mmkernels.pretrain.data"):
        open_source(Config.of("audioclip", data=f"speech::{two}"))
    lacks = [record.getMessage() for record in caplog.records if "audio" in record.getMessage()]
    assert len(lacks) == 2 and all("has no audio (streams.audio): its samples take no part" in each for each in lacks)
    for data, message in [
        (two, "expected a data set with the field 'audio', which streams.audio of recipe audioclip reads"),
        ("speech::motion", "expected data sets with some of the fields image, audio, which recipe "),
    ]:
        recipe = "audioclip" if data == two else str(heard)
        assert main(["--recipe", recipe, "--data", data]) == 1
        assert message in capsys.readouterr().err


class StoppedError(Exception):
    pass


def test_a_mixed_run_resumes_bit_for_bit(two: str, tiny: Callable[..., Config], tmp_path: Path) -> None:
    small = tiny(data=two, data_weights=(1.0, 2.0), batch=6, eval_every=0, eval_fraction=0.3)
    straight = train(small)
    assert [record["split"] for record in straight.folder.records("eval")] == ["a: held_out", "b: held_out"]
    assert "samples never seen in training" in straight.folder.report.read_text(encoding="utf-8")

    step = Journal.step

    def stopping(self: Journal, number: int, *args: Any, **rest: Any) -> None:
        step(self, number, *args, **rest)
        if number == 8:
            raise StoppedError

    broken = dataclasses.replace(small, run=tmp_path / "stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "step", stopping)
        with pytest.raises(StoppedError):
            train(broken)
    train(dataclasses.replace(broken, resume=True, workers=1))
    assert_same_end(straight.folder.path, tmp_path / "stopped")
    with pytest.raises(ValueError, match="a resumed run keeps its settings, but data_weights"):
        train(dataclasses.replace(broken, resume=True, data_weights=(1.0, 1.0)))


def test_names_of_data_sets_never_hide_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is called like an embedded data set, or like a second copy of one; two spellings of one folder."""
    monkeypatch.chdir(tmp_path)
    for name, words in (("emoji", "kite"), ("emoji (2)", "boat"), ("mine", "lake")):
        (tmp_path / name).mkdir()
        rows = [{"text": f"{words} {i}", "question": "?"} for i in range(30)]
        (tmp_path / name / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    emoji = len(open_data("emoji").train)

    def sizes(source: str) -> list[int]:
        train = open_data(source, fields=["text", "image"]).train
        assert isinstance(train, Mixed)
        return [len(part) for part in train.parts.values()]

    few = sizes("mine::mine")[0]
    assert 20 < few < 30
    assert sizes("emoji::folder:emoji")[0] == emoji and sizes("emoji::folder:emoji")[1] < 30
    assert [n == emoji for n in sizes("emoji::folder:emoji (2)::emoji")] == [True, False, True]
    twice = open_data("folder:mine::mine/table.jsonl", fields=["text"])
    assert len(np.unique(twice.train.concepts)) == few and len(twice.train) == 2 * few and len(twice.held_out) == 1


def test_a_label_that_no_set_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="labels: expected columns of emoji::scenes, got nope"):
        open_data("emoji::scenes", labels=("nope",))
