"""Filter lists: they belong to one data set, a run keeps its own, and a mixture stays one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mmkernels.pretrain import Config, train
from mmkernels.pretrain.data import FilterList, open_data
from mmkernels.pretrain.data.base import BrokenLog, TooManyBrokenError
from mmkernels.pretrain.data.filter_list import Dropped, names_digest
from mmkernels.pretrain.evaluate_cli import Evaluation, evaluate_run
from mmkernels.pretrain.run_folder import RunFolderError
from mmkernels.pretrain.setup import open_source

Make = Callable[..., Config]


def list_of(config: Config, indices: list[int], path: Path, **changes: object) -> Path:
    """A list that drops some training samples of a run."""
    source = open_source(config).train
    about = {"data": config.data, "samples": len(source), "names": names_digest(source), **changes}
    entries = (Dropped("train", i, source.logged_as(i), ("duplicates",), "", source.contents(i)) for i in indices)
    path.write_text(FilterList(about, tuple(entries)).text(), encoding="utf-8")
    return path


def test_a_run_without_some_samples(tiny: Make, tmp_path: Path) -> None:
    path = list_of(tiny(), [0, 3, 4], tmp_path / "drop.jsonl")
    whole, config = open_source(tiny()).train, tiny(filter=path, steps=2, eval_every=0)
    less = open_source(config).train
    kept = [i for i in range(len(whole)) if i not in (0, 3, 4)]
    assert [less.name(i) for i in range(len(less))] == [whole.name(i) for i in kept]
    np.testing.assert_array_equal(less.concepts, whole.concepts[kept])
    folder = train(config).folder
    assert folder.records("start")[0]["samples"] == len(kept)
    (said,) = [r["message"] for r in folder.records("warning") if r["message"].startswith("filter: ")]
    assert said == f"filter: left out 3 of {len(whole)} training samples (3 duplicates)"

    assert evaluate_run(Evaluation(folder.path, limit=5)), "which reads no list"
    again = dataclasses.replace(config, resume=True)
    train(again)
    path.write_text(path.read_text(encoding="utf-8").rstrip("\n").rpartition("\n")[0] + "\n", encoding="utf-8")
    with pytest.raises(RunFolderError, match="expected the file that this run began with"):
        train(again)
    with pytest.raises(RunFolderError, match="filter: "):
        train(dataclasses.replace(again, filter=None))


def test_a_list_of_other_data(tiny: Make, tmp_path: Path) -> None:
    path = list_of(tiny(), [1], tmp_path / "drop.jsonl")
    with pytest.raises(ValueError, match=r"filter: expected a list of these 4,\d+ training samples, got one of"):
        open_source(Config(filter=path))
    with pytest.raises(ValueError, match=r"for the same --recipe, --labels, --eval-fraction and --held-"):
        open_source(tiny(filter=path, eval_fraction=0.3))


@pytest.mark.parametrize(
    ("index", "name"), [(0, "nobody.png"), (99, "red-circle.png"), (-1, "red-circle.png")], ids=["name", "high", "low"]
)
def test_names_that_are_not_there(index: int, name: str, tiny: Make, tmp_path: Path) -> None:
    path = list_of(tiny(), [], tmp_path / "drop.jsonl")
    entry = {"split": "train", "index": index, "name": name, "reasons": ["empty"], "why": ""}
    path.write_text(path.read_text(encoding="utf-8") + json.dumps(entry) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"got sample {index}, '{name}', which is not there"):
        open_source(tiny(filter=path))


_HEAD = '{"filter": 1, "data": "", "samples": 1, "names": ""}\n{"split": "train", "index": 0, "name": "", "reasons": []'


@pytest.mark.parametrize(
    "text",
    [
        *("", "no JSON", "{}", '{"filter": 2}', '{"filter": 1}', "[1]", "\x00"),
        *(f'{_HEAD}, "contents": {contents}}}' for contents in ("1", "null", '"image"', "[1]")),
    ],
)
def test_no_list_at_all(text: str, tiny: Make, tmp_path: Path) -> None:
    path = tmp_path / "drop.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="filter: expected a list that mmkernels data-report --drop wrote, got"):
        open_source(tiny(filter=path))
    with pytest.raises(ValueError, match="which does not exist"):
        open_source(tiny(filter=tmp_path / "gone.jsonl"))


def test_what_is_left_is_less_than_a_batch(tiny: Make, tmp_path: Path) -> None:
    path = list_of(tiny(), list(range(15)), tmp_path / "drop.jsonl")
    with pytest.raises(ValueError, match="batch: expected 1 to"):
        train(tiny(filter=path, batch=16))


def test_a_mixture_stays_one(pictures: Path) -> None:
    """Shares, concepts and held-out sets of its parts."""
    whole = open_data(f"emoji::{pictures}", weights=(1, 2))
    few = whole.train.only(np.array([0, 2, 4874, 4880]))
    assert [few.logged_as(i) for i in range(4)] == [whole.train.logged_as(i) for i in (0, 2, 4874, 4880)]
    np.testing.assert_array_equal(few.concepts, whole.train.concepts[[0, 2, 4874, 4880]])
    assert few.shares is not None and (few.shares.sizes, few.shares.weights) == ((2, 2), (1, 2))
    assert few[2].values["text"] == whole.train[4874].values["text"]
    with pytest.raises(ValueError, match="expected samples in every set, got none in emoji"):
        whole.train.only(np.array([4880]))


def test_excused_names_do_not_count() -> None:
    log = BrokenLog(10, 1.0)
    log.add("a", "cut")
    log.excuse(["a", "b"])
    log.limit(0.0)
    log.add("b", "cut")
    assert not len(log) and log.left_out == {"a": "cut", "b": "cut"}
    with pytest.raises(TooManyBrokenError, match=r"1 of 10 samples could not be read, more than max_broken=0\.0"):
        log.add("c", "cut")
