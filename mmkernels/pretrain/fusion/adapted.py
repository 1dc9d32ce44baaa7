"""Adapters in a fusion, as in an encoder: they learn while the rest stays as it is.

Source: Houlsby et al. 2019 (arXiv:1902.00751).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmkernels.pretrain.fusion.base import Fusion
from mmkernels.pretrain.layers import add_adapters
from mmkernels.pretrain.recipe import Facts

__all__ = ["AdaptedFusion"]


@dataclass(frozen=True)
class AdaptedFusion:
    """A fusion with an adapter after each attention and each feed-forward of its layers. The fusion's own parameters
    keep their names; those of the adapters match the pattern `*.adapter.*`."""

    fusion: Any
    """Any fusion with layers."""
    reduction: int = 8
    """Channels of a token divided by those of an adapter's hidden layer."""

    def __post_init__(self) -> None:
        if self.reduction < 1:
            raise ValueError(f"reduction: expected at least 1, got {self.reduction}")

    def __getattr__(self, name: str) -> Any:
        """What others ask of the fusion, such as the streams that it writes `into`."""
        if name.startswith("__") or name == "fusion":  # while this is being copied
            raise AttributeError(name)
        return getattr(self.fusion, name)

    def build(self, facts: Facts) -> Fusion:
        module: Fusion = self.fusion.build(facts)
        if not add_adapters(module, facts.shape.width, self.reduction):
            raise ValueError(f"AdaptedFusion: fusion: expected one with layers, got {self.fusion}")
        return module
