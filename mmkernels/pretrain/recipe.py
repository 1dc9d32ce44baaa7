"""A recipe: which inputs, which encoders, how they meet, which objectives, on which schedule. Frozen data, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmkernels.pretrain.mixing import Mixing
from mmkernels.pretrain.policies import Policy
from mmkernels.pretrain.stages import Ramp, Stage

__all__ = ["Facts", "Ramp", "Recipe", "Shape", "Stage", "Stream"]


@dataclass(frozen=True)
class Shape:
    """Sizes that all parts of a model share."""

    width: int = 128
    """Channels of a token."""
    heads: int = 4
    """Attention heads; they split the width."""
    embed_dim: int = 128
    """Dimension of the embeddings that batch objectives compare."""
    dropout: float = 0.0
    """Fraction of activations dropped after attention and MLP; which ones depends on the chunk."""

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width: expected a multiple of {self.heads} heads, got {self.width}")


@dataclass(frozen=True)
class Facts:
    """What a part is told when it is built: the run's sizes, and what the data has."""

    shape: Shape
    vocabulary: int  # tokens of the tokenizer
    classes: Mapping[str, Sequence[str]]  # names of the classes of each label field
    streams: Mapping[str, Stream]
    seed: int = 0
    backend: str | None = None
    recompute: bool = False  # activations of each block are computed again in the backward


def _expect_several(name: str, values: Any) -> None:
    """A tuple of one needs a comma, which is easily forgotten."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{name}: expected a tuple, such as ({type(values).__name__}(...),), got {values!r}")


@dataclass(frozen=True)
class Stream:
    """One input of the model."""

    encoder: Any
    """From prepared values to tokens [T, C]."""
    field: str = ""
    """Field of the samples; empty: the stream's own name."""
    views: tuple[Any, ...] = ()
    """Random changes of its values and tokens, drawn at each step."""
    pool: str = "mean"
    """From tokens to one embedding: mean, max or first."""
    project: str = "linear"
    """From there to the shared space: linear, mlp, or none (the width is then the embedding's)."""
    tied: str = ""
    """A stream whose encoder this one shares."""
    teacher: Any = None
    """An `Ema`: a twin of the encoder that follows it slowly, built where an objective reads it."""

    def __post_init__(self) -> None:
        _expect_several("views", self.views)


@dataclass(frozen=True)
class Recipe:
    """A pretraining system as a value. `mmkernels recipes` lists those that come along."""

    summary: str
    source: str
    data: str
    streams: Mapping[str, Stream]
    objectives: Mapping[str, Any]
    fusion: Any = None
    metrics: tuple[Any, ...] = ()
    stages: tuple[Stage, ...] = (Stage(),)
    draw: bool = False
    """One objective a step, drawn by weight, instead of their weighted sum."""
    model: Shape = Shape()
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the run, where they differ from `Config`'s
    policy: Policy = Policy()  # noqa: RUF009  frozen
    mixing: Mixing = Mixing()  # noqa: RUF009  frozen

    def __post_init__(self) -> None:
        _expect_several("metrics", self.metrics)
        _expect_several("stages", self.stages)
