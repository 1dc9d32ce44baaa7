"""Regions: from boxes and crops to tokens, and to features."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pretrain.packed import facts

from mmkernels import PackedBatch
from mmkernels.pretrain.data import Regions as Found
from mmkernels.pretrain.encoders import Regions
from mmkernels.pretrain.recipe import Stream
from mmkernels.pretrain.region_columns import CROP, HIDDEN, columns

NONE: Any = None  # tokenizer, which regions do not need


def regions(n: int, side: int = 6, seed: int = 0) -> Found:
    random = np.random.default_rng(seed)
    corners = np.sort(random.random((n, 2, 2)), axis=1).reshape(n, 4).astype(np.float32)
    return Found(corners, random.integers(0, 256, (n, side, side, 3)).astype(np.uint8), random.integers(0, 5, n))


def packed(part: Regions, values: list[Any]) -> PackedBatch:
    return PackedBatch.from_samples([piece.tokens for piece in part.prepare(values, NONE)])


def test_a_token_has_box_area_and_crop() -> None:
    part, value = Regions(side=6), regions(3)
    none, some, empty = part.prepare([None, value, regions(0)], NONE)
    assert len(none.tokens) == len(empty.tokens) == 0
    assert some.tokens.shape == (3, columns(6))
    torch.testing.assert_close(some.tokens[:, :4], torch.from_numpy(value.boxes))
    left, top, right, bottom = value.boxes.T
    torch.testing.assert_close(some.tokens[:, 4], torch.from_numpy((right - left) * (bottom - top)))
    assert (some.tokens[:, HIDDEN] == 0).all()
    pixels = torch.from_numpy(value.crops).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(some.tokens[:, CROP], pixels.flatten(1), atol=1e-5, rtol=0)
    assert some.labels is not None
    assert some.labels.tolist() == value.tags.tolist()
    assert [part.length(each, NONE) for each in (None, value)] == [0, 3]


def test_crops_of_any_size() -> None:
    part = Regions(side=4)
    small, large = part.prepare([regions(2, 6), regions(1, 9)], NONE)
    assert small.tokens.shape == (2, columns(4))
    assert large.tokens.shape == (1, columns(4))


@pytest.mark.parametrize("layers", [0, 1])
def test_features(layers: int) -> None:
    """Of the crop and the box both, but not of a hidden crop; samples do not mix."""
    part = Regions(layers, side=6)
    module = part.build(facts({"regions": Stream(part)}))
    batch = packed(part, [regions(2), None, regions(3, seed=1)])
    x = module(batch)
    assert module.layout(batch).cu_seqlens_host == (0, 2, 2, 5)

    def after(row: int, column: int | slice, value: float) -> list[int]:
        """Tokens whose features change with the input."""
        tokens = batch.tokens.clone()
        tokens[row, column] = value
        other = packed(part, [regions(2), None, regions(3, seed=1)])
        other.tokens.copy_(tokens)
        return ((module(other) - x).abs() > 1e-6).any(1).nonzero().flatten().tolist()

    for column in (0, 4, 6, HIDDEN):
        assert after(1, column, 1.0)[-1] == 1
    batch.tokens[1, HIDDEN] = 1
    x = module(batch)
    assert after(1, CROP, 0.5) == []


def test_a_batch_without_regions() -> None:
    part = Regions()
    module = part.build(facts({"regions": Stream(part)}))
    assert module(packed(part, [None, None])).shape == (0, 16)


def test_wrong_values() -> None:
    good = regions(2)
    for bad in (
        good._replace(boxes=good.boxes[:1]),
        good._replace(crops=good.crops[..., :2]),
        good._replace(tags=good.tags[:1]),
        "a text",
    ):
        with pytest.raises(ValueError, match=r"value: expected Regions with boxes \[n, 4\]"):
            Regions().prepare([None, bad], NONE)
    with pytest.raises(ValueError, match="side: expected at least 1"):
        Regions(side=0)
