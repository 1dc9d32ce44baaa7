"""Hugging Face data sets in a folder: the same columns, labels and messages as in a table."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmkernels.pretrain.data import TableFormat, Text, open_data

datasets = pytest.importorskip("datasets")


def rows(count: int) -> dict[str, list[Any]]:
    return {
        "image": [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(count)],
        "caption": [f"thing {i}" if i % 2 else [f"thing {i}", "again"] for i in range(count)],
        "label": [i % 3 for i in range(count)],
    }


def saved(path: Path, count: int = 20, **columns: list[Any]) -> Any:
    content = rows(count) | columns
    content["caption"] = [[c] if isinstance(c, str) else c for c in content["caption"]]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "caption": datasets.Sequence(datasets.Value("string")),
            "label": datasets.ClassLabel(names=["zebra", "ant", "mole"]),
        }
    )
    made = datasets.Dataset.from_dict(content, features=features)
    made.save_to_disk(str(path))
    return made


def test_a_saved_data_set(tmp_path: Path) -> None:
    saved(tmp_path / "d")
    data = open_data(f"hf:{tmp_path / 'd'}", labels=("label",), eval_fraction=0.2, resolution=8)
    assert data.train.classes == {"label": ("ant", "mole", "zebra")}
    assert len(data.train) + len(data.held_out["held_out"]) == 20
    for sample in (*data.train.read(range(len(data.train))), *data.held_out["held_out"].read(range(2))):
        row = int(sample.name.removeprefix("row ")) - 1
        assert sample.captions[0] == f"thing {row}"
        assert sample.image[4, 4].tolist() == [row, 0, 0, 255]
        assert data.train.classes["label"][sample.values["label"]] == ("zebra", "ant", "mole")[row % 3]


def test_splits_are_held_out_sets(tmp_path: Path) -> None:
    both = datasets.DatasetDict({name: saved(tmp_path / name, n) for name, n in (("train", 6), ("test", 4))})
    both.save_to_disk(str(tmp_path / "both"))
    data = open_data(f"hf:{tmp_path / 'both'}", max_eval=3)
    assert len(data.train) == 6
    assert {name: len(source) for name, source in data.held_out.items()} == {"test": 3}
    assert len(open_data(f"hf:{tmp_path / 'both'}:test", eval_fraction=0).train) == 4
    with pytest.raises(ValueError, match="expected one of the splits train, test, got 'dev'"):
        open_data(f"hf:{tmp_path / 'both'}:dev")


def test_broken_images_and_missing_values_are_named(tmp_path: Path) -> None:
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    images = [{"bytes": out.getvalue(), "path": None}, {"bytes": b"no image", "path": None}, None]
    saved(tmp_path / "d", 3, image=images)
    train = open_data(f"hf:{tmp_path / 'd'}", eval_fraction=0, max_broken=1.0).train
    assert [sample.name for sample in train.read(range(len(train)))] == ["row 1"]
    assert train.broken.reasons["row 3"] == "image: expected a file, got None"
    assert "UnidentifiedImageError" in train.broken.reasons["row 2"]


def test_names_and_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = datasets.Dataset.from_dict({"title": ["a", "b"], "n": [1.5, None], "vector": [[1.0], [2.0]]})
    made.save_to_disk(str(tmp_path / "d"))
    form = TableFormat(caption_key="title")
    train = open_data(
        f"hf:{tmp_path / 'd'}", fields=("text", "vector"), labels=("n",), table=form, eval_fraction=0
    ).train
    first, second = train.read(range(2))
    assert first.values["text"] == Text(("a",))
    assert first.values["n"] == 0
    assert "n" not in second.values
    np.testing.assert_array_equal(second.values["vector"], [2.0])
    with pytest.raises(ValueError, match=r"expected the columns 'image' and 'caption', got \['title', 'n', 'vector'\]"):
        open_data(f"hf:{tmp_path / 'd'}")
    with pytest.raises(ValueError, match="csv_separator: expected none for hf:"):
        open_data(f"hf:{tmp_path / 'd'}", table=TableFormat(";"))
    with pytest.raises(ValueError, match="expected a data set that can be opened, got"):
        open_data(f"hf:{tmp_path / 'gone' / 'away'}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"hf:x: needs the package datasets: pip install 'mmkernels\[hf\]'"):
        open_data("hf:x")
