"""One small file per recipe: its settings where they differ from the defaults, and its objective.

A recipe module has `SETTINGS`, changes to the default `Config`, and `objective(config)`, an `Objective`.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from torch import Tensor, nn

__all__ = ["RECIPES", "Objective", "recipe"]

RECIPES = ("clip", "siglip")


class Objective(nn.Module):
    """A loss over the embeddings of a batch, possibly with parameters."""

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        """Loss of images [N, E] and texts [N, E]; row i of one belongs to row i of the other."""
        raise NotImplementedError

    def clamp_(self) -> None:
        """Called after every optimizer step."""

    def metrics(self) -> dict[str, float]:
        """Values of the parameters, for the log."""
        return {}

    def chance_loss(self, n: int) -> float:
        """The loss of a random guess over n pairs."""
        raise NotImplementedError


def recipe(name: str) -> ModuleType:
    """The module of a recipe. Raise ValueError for an unknown name."""
    if name not in RECIPES:
        raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}, got {name!r}")
    return import_module(f"{__name__}.{name}")
