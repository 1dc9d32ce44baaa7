"""A run whose report is of an untrained model, and six samples held out."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from pretrain.small_model import Samples, built, held_out, recipe

from mmkernels.pretrain.data import Regions as RegionsValue
from mmkernels.pretrain.data import Text
from mmkernels.pretrain.report.render import rendered
from mmkernels.pretrain.report.sections import sections_of

__all__ = ["CAPTIONS", "NAMES", "NO_FIGURES", "run_of", "samples", "section"]

NAMES = ("no", "yes", "three <b>")
CAPTIONS = ("a red cat", "a blue dog & <i>a cat</i>", "a red dog", "a blue cat 🙂", "a cat", "a dog")


def samples(count: int = 6) -> Samples:
    """With a picture, a caption, regions and an answer each."""
    random = np.random.default_rng(0)
    values = []
    for i in range(count):
        boxes = np.array([[0, 0, 0.5, 0.5], [0.5, 0.25, 1, 1], [0, 0.5, 0.25, 1]], np.float32)[: 2 + i % 2]
        crops = random.integers(0, 256, (len(boxes), 4, 4, 3), dtype=np.uint8)
        image = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        regions = RegionsValue(boxes, crops, np.arange(len(boxes), dtype=np.int64))
        values.append({"image": image, "text": Text((CAPTIONS[i],)), "regions": regions, "answer": i % 3})
    return Samples(values, classes={"answer": NAMES, "tag": ("cat", "dog", "sun")})


def run_of(**parts: Any) -> Any:
    """An untrained model of a recipe, and six samples held out."""
    of, source = recipe(**parts), samples()
    of = replace(of, metrics=parts.get("metrics", ()))
    model = built(of, source).float().eval()
    sets = {"held_out": replace(held_out(of, source, source), name="held_out")}
    return SimpleNamespace(recipe=of, trained=model, held_out=sets, learned=set(of.objectives))


def section(run: Any, template: str) -> Any:
    (found,) = [each for each in sections_of(run) if each.template == template]
    page = rendered("report.html.jinja", **NO_FIGURES, sections=[found])
    assert "<i>a cat" not in page and "three <b>" not in page, "everything is escaped"
    return found


NO_FIGURES: dict[str, Any] = {
    "config": SimpleNamespace(title="r", steps=1, tokens=None, batch=1, seed=0),
    "data": "d",
    "recipe": SimpleNamespace(summary="s", source="s"),
    "environment": {"device": "cpu", "threads": "1", "mmkernels": "0", "torch": "2"},
    "table": SimpleNamespace(rows=[]),
    "steps": 0,
    "intervals": False,
    **dict.fromkeys(("headlines", "warnings", "recalls", "groups", "speed"), ()),
    **{name: {} for name in ("loss_svgs", "figure_svgs", "other_svgs", "settings")},
}
