"""A folder of small captioned pictures, and a run on it that takes a second."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from pretrain.runs import TINY

from mmkernels.pretrain import Config

COLOURS = ("red", "green", "blue", "orange", "purple", "black")
SHAPES = ("circle", "square", "cross", "bar", "frame")


def draw(colour: str, shape: str, side: int = 24) -> Image.Image:
    image = Image.new("RGB", (side, side), "white")
    pen, low, high = ImageDraw.Draw(image), side // 5, side - side // 5
    if shape == "circle":
        pen.ellipse((low, low, high, high), fill=colour)
    elif shape == "square":
        pen.rectangle((low, low, high, high), fill=colour)
    elif shape == "cross":
        pen.line((low, low, high, high), fill=colour, width=4)
        pen.line((low, high, high, low), fill=colour, width=4)
    elif shape == "bar":
        pen.rectangle((low, side // 2 - 2, high, side // 2 + 2), fill=colour)
    else:
        pen.rectangle((low, low, high, high), outline=colour, width=3)
    return image


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Thirty pictures, each with one caption."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for colour in COLOURS:
        for shape in SHAPES:
            draw(colour, shape).save(folder / f"{colour}-{shape}.png")
            rows.append(json.dumps({"image": f"{colour}-{shape}.png", "caption": f"a {colour} {shape}"}))
    (folder / "captions.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


@pytest.fixture
def tiny(pictures: Path, tmp_path: Path) -> Callable[..., Config]:
    """Settings of a small run; keyword arguments change them."""
    config = Config(data=f"folder:{pictures}", run=tmp_path / "run", steps=12, batch=8, chunk=3, warmup=2, parts=TINY)
    config = dataclasses.replace(
        config, eval_every=5, checkpoint_every=3, eval_fraction=0.2, tensorboard=False, threads=1
    )

    def make(**changes: Any) -> Config:
        return dataclasses.replace(config, **changes)

    return make


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """A run sets its process's number of threads: restore it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
