"""Every setting of a run, frozen. It defines the command line too: `--lr 2e-3 --model.width 192`."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmkernels.pretrain.data import Augment, TableFormat

__all__ = ["Config", "ModelConfig", "from_dict", "to_dict"]


@dataclass(frozen=True)
class ModelConfig:
    """The two towers and their shared space."""

    image_size: int = 32
    """Side of the images the model sees, in pixels."""
    width: int = 128
    """Channels of a token."""
    heads: int = 4
    """Attention heads; they split the width."""
    image_layers: int = 2
    """Transformer blocks over image tokens (one token per 8 x 8 pixels)."""
    text_layers: int = 2
    """Transformer blocks over word tokens."""
    embed_dim: int = 128
    """Dimension of the shared space."""
    word_buckets: int = 4096
    """Rows of the hashed word table."""
    gram_buckets: int = 8192
    """Rows of the hashed character-trigram table."""
    max_words: int = 16
    """Maximum words per caption; longer ones are truncated."""
    dropout: float = 0.0
    """Fraction of activations dropped after attention and MLP."""


@dataclass(frozen=True)
class Config:
    """Pretrain an image and a text tower."""

    recipe: str = "clip"
    """The objective: clip or siglip."""
    data: str = "emoji"
    """emoji (embedded); folder:PATH of a .jsonl, .csv, .tsv or .parquet, or its folder; webdataset:PATTERN of tars."""
    csv_separator: str | None = None
    """Field separator of a .csv or .tsv; None: a tab in a .tsv, else a comma."""
    csv_img_key: str = "image"
    """Column of a table (key of a .jsonl) with the images' paths."""
    csv_caption_key: str = "caption"
    """Column of a table (key of a .jsonl) with the captions."""
    run: Path | None = None
    """Run folder; default runs/RECIPE."""
    resume: bool = False
    """Resume from the newest checkpoint in the folder."""
    seed: int = 0
    """Seed of the weights, the data order and the augmentation."""

    steps: int = 800
    """Optimizer steps."""
    batch: int = 128
    """Samples that are contrasted with each other."""
    chunk: int = 64
    """Samples whose activations are in memory at a time (gradient caching)."""
    lr: float = 1.5e-3
    """Peak learning rate."""
    warmup: int = 50
    """Steps of linear warm-up; cosine decay to zero follows."""
    weight_decay: float = 0.1
    """Weight decay of matrices; norms, biases and scalars have none."""
    beta2: float = 0.98
    """Second AdamW decay rate."""
    clip_grad: float = 1.0
    """Maximum gradient norm."""
    max_logit_scale: float = 100.0
    """Upper bound of the learned logit scale."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast."""

    model: ModelConfig = field(default_factory=ModelConfig)
    augment: Augment = field(default_factory=Augment)

    eval_every: int = 200
    """Steps between evaluations; 0: only at the end."""
    checkpoint_every: int = 50
    """Steps between checkpoints; 0: only at the end (and on Ctrl-C)."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep."""
    eval_fraction: float = 0.1
    """Fraction of your own captions held out for evaluation."""
    max_broken: float = 0.05
    """Fraction of unreadable images above which the run stops."""
    tensorboard: bool = True
    """Also log for TensorBoard, if it is installed."""
    profile: tuple[int, int] | None = None
    """First step and number of steps to trace with the PyTorch profiler; the trace goes into the run folder."""

    device: str = "auto"
    """auto: CUDA if available, else the CPU."""
    threads: int = 0
    """CPU threads; 0: PyTorch's default."""
    backend: Literal["native", "triton", "reference"] | None = None
    """Backend of every mmkernels op; None: the fastest available."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "chunk", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("warmup", "eval_every", "checkpoint_every", "threads", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        for name in ("lr", "clip_grad", "max_logit_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        TableFormat(self.csv_separator, self.csv_img_key, self.csv_caption_key)  # validates them
        if self.model.width % self.model.heads:
            raise ValueError(f"model.width: expected a multiple of {self.model.heads} heads, got {self.model.width}")
        if self.model.image_size % 8:
            raise ValueError(f"model.image_size: expected a multiple of 8 pixels, got {self.model.image_size}")

    @property
    def folder(self) -> Path:
        return self.run if self.run is not None else Path("runs") / self.recipe

    @property
    def table(self) -> TableFormat:
        return TableFormat(self.csv_separator, self.csv_img_key, self.csv_caption_key)


# Settings that a resumed run may change.
RESUMABLE = frozenset(
    {"run", "resume", "eval_every", "checkpoint_every", "keep_checkpoints", "tensorboard", "profile", "device"}
    | {"threads", "backend", "max_broken"}
)


def to_dict(config: Config) -> dict[str, Any]:
    """The config as JSON values."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return values


def from_dict(values: Mapping[str, Any], cls: type[Any] = Config) -> Any:
    """The inverse of `to_dict`. Raise ValueError for a setting that this version does not have."""
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"config: expected settings of this version, got {', '.join(unknown)}")
    return cls(**{name: _restore(hints[name], value) for name, value in values.items()})


def _restore(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if dataclasses.is_dataclass(hint):
        return from_dict(value, typing.cast(type[Any], hint))
    if typing.get_origin(hint) is tuple:
        return tuple(value)
    return Path(value) if hint is Path else value
