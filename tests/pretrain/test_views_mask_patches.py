from __future__ import annotations

import numpy as np
import pytest
import torch

from mmkernels import Media, Modality
from mmkernels.pretrain.batch import Piece
from mmkernels.pretrain.data.seeds import Draws
from mmkernels.pretrain.views import MaskPatches


def image(n: int) -> Media:
    return Media(Modality.IMAGE, torch.randn(n, 12), (1, 1, n))


def labels(view: MaskPatches, pieces: list[Piece], step: int = 0) -> list[torch.Tensor | None]:
    found = view(pieces, Draws(0, step, "image/MaskPatches/0", np.arange(len(pieces))), {})
    for before, after in zip(pieces, found, strict=True):
        assert after.tokens is before.tokens
    return [piece.labels for piece in found]


@pytest.mark.parametrize(("length", "hidden"), [(16, 12), (2, 1), (3, 2), (1, 0)])
def test_hides_a_share_and_leaves_one(length: int, hidden: int) -> None:
    (label,) = labels(MaskPatches(share=0.75), [Piece([image(length)])])
    assert label is not None and label.dtype == torch.int64 and int((label >= 0).sum()) == hidden
    places = torch.arange(length)
    assert torch.equal(label, torch.where(label >= 0, places, -100))


def test_each_item_of_a_sample_and_text_beside_it() -> None:
    piece = Piece([torch.tensor([7, 8]), image(4), image(8)])
    (label,) = labels(MaskPatches(share=0.5), [piece])
    assert label is not None and (label[:2] == -100).all()
    assert [int((part >= 0).sum()) for part in (label[2:6], label[6:])] == [2, 4]
    assert int(label[6:].max()) < 8


def test_other_patches_at_each_step_and_for_each_sample() -> None:
    view, pieces = MaskPatches(), [Piece([image(64)]), Piece([]), Piece(torch.randn(64, 5))]
    first, none, third = labels(view, pieces)
    assert none is None
    assert first is not None and third is not None and not torch.equal(first, third)
    again, other = labels(view, pieces)[0], labels(view, pieces, step=1)[0]
    assert torch.equal(first, again) and not torch.equal(first, other)  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0])
def test_share_is_checked(share: float) -> None:
    with pytest.raises(ValueError, match="share"):
        MaskPatches(share=share)
