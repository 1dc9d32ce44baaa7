"""A fraction of the training samples: the same with every seed, nested, after filter lists, of each set of mixtures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mmkernels.pretrain import Config
from mmkernels.pretrain.data import FilterList, Source
from mmkernels.pretrain.data.filter_list import Dropped, names_digest
from mmkernels.pretrain.setup import open_source

Make = Callable[..., Config]


def names(source: Source) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def test_nested_and_the_same_with_every_seed() -> None:
    whole = open_source(Config())
    tenth, half = (open_source(Config(train_fraction=fraction)) for fraction in (0.1, 0.5))
    assert len(tenth.train) == pytest.approx(0.1 * len(whole.train), rel=0.2)
    assert len(half.train) == pytest.approx(0.5 * len(whole.train), rel=0.1)
    assert set(names(tenth.train)) < set(names(half.train)) < set(names(whole.train))
    assert names(open_source(Config(train_fraction=0.1, seed=7)).train) == names(tenth.train)
    assert tenth.train.classes == whole.train.classes
    for split, source in whole.held_out.items():
        assert names(tenth.held_out[split]) == names(source)
    assert open_source(Config(train_fraction=1.0)).train is not None


def test_of_what_a_validation_leaves(tiny: Make) -> None:
    """The concepts that are held out stay the same."""
    whole, few = open_source(tiny(validate=True)), open_source(tiny(validate=True, train_fraction=0.5))
    assert names(few.held_out["validation"]) == names(whole.held_out["validation"])
    assert set(names(few.train)) < set(names(whole.train))


def test_of_what_a_filter_list_leaves(tiny: Make, tmp_path: Path) -> None:
    """The list belongs to the whole training set."""
    whole = open_source(tiny()).train
    half = names(open_source(tiny(train_fraction=0.5)).train)
    about = {"data": "pictures", "samples": len(whole), "names": names_digest(whole)}
    drop = Dropped("train", names(whole).index(half[0]), half[0], ("duplicates",))
    (tmp_path / "drop.jsonl").write_text(FilterList(about, (drop,)).text(), encoding="utf-8")
    assert names(open_source(tiny(train_fraction=0.5, filter=tmp_path / "drop.jsonl")).train) == half[1:]


def test_of_each_set_of_a_mixture() -> None:
    changes = {"data": "emoji::scenes", "data_weights": (3.0, 1.0)}
    whole = open_source(Config.of("clip", **changes)).train
    few = open_source(Config.of("clip", train_fraction=0.2, **changes)).train
    assert few.shares is not None and whole.shares is not None
    np.testing.assert_allclose(few.shares.weights, whole.shares.weights)
    assert list(few.parts) == list(whole.parts)
    for name, part in few.parts.items():
        assert len(part) == pytest.approx(0.2 * len(whole.parts[name]), rel=0.2)
    assert set(few.concepts.tolist()) <= set(whole.concepts.tolist())


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, float("nan")])
def test_wrong_fractions(fraction: float) -> None:
    with pytest.raises(ValueError, match="train_fraction: expected 0 < train_fraction <= 1, got"):
        Config(train_fraction=fraction)


def test_too_small_a_fraction(tiny: Make) -> None:
    with pytest.raises(ValueError, match=r"train_fraction: expected enough for a sample of the [0-9]+ in folder:"):
        open_source(tiny(train_fraction=1e-9))
