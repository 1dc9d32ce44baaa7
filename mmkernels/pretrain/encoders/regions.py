"""Regions of an image, as a detector gives them: what each shows and where it lies.

Source: Chen et al. 2020 (UNITER, arXiv:1909.11740).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmkernels import PackedBatch
from mmkernels.pretrain.batch import Piece
from mmkernels.pretrain.encoders.base import EncoderModule
from mmkernels.pretrain.layers import Blocks
from mmkernels.pretrain.pixels import plain_images
from mmkernels.pretrain.recipe import Facts
from mmkernels.pretrain.region_columns import BOX, CROP, HIDDEN, columns
from mmkernels.pretrain.tokenizer import TextTokenizer

__all__ = ["Regions"]


@dataclass(frozen=True)
class Regions:
    """One token per region, the sum of two linear layers: of its crop, and of its box and area."""

    layers: int = 0
    """Transformer blocks; regions are a set, to which only the boxes give an order."""
    side: int = 12
    """Side of the crops that the model sees, in pixels."""

    def __post_init__(self) -> None:
        if self.side < 1:
            raise ValueError(f"side: expected at least 1 pixel, got {self.side}")

    @property
    def reads_text(self) -> bool:
        return False

    def prepare(self, values: Sequence[Any], tokenizer: TextTokenizer) -> list[Piece]:
        """`Regions` of n objects -> tokens float32 [n, columns(side)], labels int64 [n]: their tags."""
        none = torch.zeros((0, columns(self.side)))
        found = [value for value in values if value is not None and len(_checked(value).boxes)]
        if not found:
            return [Piece(none) for _ in values]
        boxes = torch.from_numpy(np.concatenate([value.boxes for value in found]).astype(np.float32))
        crops = plain_images([crop for value in found for crop in value.crops], self.side)
        tokens = torch.zeros((len(boxes), columns(self.side)))
        tokens[:, BOX.start : 4] = boxes
        tokens[:, 4] = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        tokens[:, CROP] = crops.flatten(1)
        each = iter(tokens.split([len(value.boxes) for value in found]))
        return [
            Piece(none)
            if value is None or not len(value.boxes)
            else Piece(next(each), torch.from_numpy(np.asarray(value.tags, np.int64)))
            for value in values
        ]

    def length(self, value: Any, tokenizer: TextTokenizer) -> int:
        return 0 if value is None else len(_checked(value).boxes)

    def build(self, facts: Facts) -> EncoderModule:
        return RegionsEncoder(self, facts)


class RegionsEncoder(EncoderModule):
    def __init__(self, part: Regions, facts: Facts) -> None:
        super().__init__()
        width = facts.shape.width
        self.look, self.place = nn.Linear(3 * part.side**2, width), nn.Linear(5, width)
        # Normalised apart: a box of five numbers would otherwise be lost beside hundreds of pixels.
        self.norm_look, self.norm_place = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blocks = Blocks(part.layers, facts)

    def forward(self, batch: PackedBatch) -> Tensor:
        rows = batch.tokens
        crops = rows[:, CROP] * (1 - rows[:, HIDDEN, None])
        x = self.norm_look(self.look(crops)) + self.norm_place(self.place(rows[:, BOX]))
        return self.blocks(x, self.layout(batch).mask())


def _checked(value: Any) -> Any:
    """`Regions` whose arrays have the shapes that they should. Raises ValueError."""
    shapes = {name: np.shape(getattr(value, name, 0)) for name in ("boxes", "crops", "tags")}
    n = len(shapes["tags"]) and shapes["tags"][0]
    boxes, crops = shapes["boxes"], shapes["crops"]
    good = boxes == (n, 4) and len(crops) == 4 and (crops[0], crops[3]) == (n, 3) and crops[1] == crops[2]
    if not good:
        got = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise ValueError(f"value: expected Regions with boxes [n, 4], crops [n, c, c, 3] and tags [n], got {got}")
    return value
