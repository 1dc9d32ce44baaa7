"""A recipe of your own with BatchNorm in an encoder, for tests."""

from __future__ import annotations

import textwrap
from pathlib import Path

NORMED = """
    from torch import nn

    from mmkernels.pretrain import Recipe, Stream
    from mmkernels.pretrain.encoders import Module, Words
    from mmkernels.pretrain.objectives import Contrast
    from mmkernels.pretrain.recipe import Shape
    from mmkernels.pretrain.state import Ema


    def net() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.BatchNorm1d(8))


    RECIPE = Recipe(
        "A norm over the batch",
        source="",
        data="scenes",
        streams={
            "image": Stream(Module(net, out=8, size=16), teacher=Ema(0.9)),
            "text": Stream(Words(layers=0), teacher=Ema(0.9)),
        },
        objectives={"contrast": Contrast("image", "text", queue=64)},
        model=Shape(16, 2, 8),
        settings={"batch": 8, "chunk": 8, "steps": 8},
    )
"""


def write_normed(folder: Path) -> str:
    """The recipe's file."""
    path = folder / "normed.py"
    path.write_text(textwrap.dedent(NORMED), encoding="utf-8")
    return str(path)
