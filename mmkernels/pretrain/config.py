"""Every setting of a run that does not belong to its recipe, frozen."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmkernels.pretrain.data import TableFormat, check_weights
from mmkernels.pretrain.recipe import Recipe
from mmkernels.pretrain.recipes import DEFAULT, load
from mmkernels.pretrain.transfer import Transfer, transferred
from mmkernels.pretrain.wiring import with_leaves

__all__ = ["RESUMABLE", "Config", "from_dict", "to_dict"]


@dataclass(frozen=True)
class Config:
    """Pretrain a model: a recipe on data.

    `Config.of("siglip", steps=100)` begins with the recipe's own settings; `Config(...)` with the defaults below.
    """

    recipe: str = DEFAULT
    """Name of a recipe (`mmkernels recipes` lists them), or a Python file with a RECIPE in it."""
    parts: Mapping[str, Any] = field(default_factory=dict)
    """Changed settings of the recipe, by dotted name: {"objectives.contrast.weight": 0.5}."""
    data: str | None = None
    """Name of an embedded data set; folder:PATH of a .jsonl, .csv, .tsv or .parquet, or its folder; webdataset:PATTERN
    of tars; hf:NAME_OR_PATH[:split] of a Hugging Face data set; several with :: in between; None: the recipe's."""
    data_weights: tuple[float, ...] | None = None
    """Of several data sets, the share of the training samples that comes from each; None: by size."""
    labels: tuple[str, ...] = ()
    """Columns of your own data whose values are classes, besides those that the recipe reads as labels."""
    csv_separator: str | None = None
    """Field separator of a .csv or .tsv; None: a tab in a .tsv, else a comma."""
    csv_img_key: str = "image"
    """Column of a table (key of a .jsonl) with the images' paths."""
    csv_caption_key: str = "caption"
    """Column of a table (key of a .jsonl) with the captions."""
    filter: Path | None = None
    """List of training samples to leave out, which `mmkernels data-report --drop` writes."""
    run: Path | None = None
    """Run folder; default runs/RECIPE."""
    init: Path | None = None
    """Folder of another run, whose newest weights this one begins with: those whose names this model has. Its tokenizer
    is taken over too, if it read texts."""
    fresh: tuple[str, ...] = ()
    """With --init: patterns of the names of parameters that are drawn anew all the same; "*": only the tokenizer is
    taken over."""
    transfers: tuple[Transfer, ...] = ()
    """What `mmkernels finetune` has made of the recipe, one after the other."""
    resume: bool = False
    """Resume from the newest checkpoint in the folder."""
    again: bool = False
    """Resume if the run has begun, else begin it: for launchers that start the same command again."""
    seed: int = 0
    """Seed of the weights, the data order and the views."""

    steps: int = 800
    """Optimizer steps."""
    batch: int = 128
    """Samples of an optimizer step; with --tokens, at most."""
    tokens: int | None = None
    """Tokens of an optimizer step, at most, planned so that little is left unused; None: unbounded."""
    chunk: int = 64
    """Samples whose activations are in memory at a time; the gradient is that of the whole batch."""
    workers: int = 0
    """Processes that read ahead; 0: none. The batches do not depend on it."""
    vocabulary: int = 2048
    """Most tokens of the tokenizer, which is trained on the training texts."""
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
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, which is then evaluated and loaded; 0: none."""
    recompute: bool = False
    """Compute activations of transformer blocks again in the backward instead of keeping them."""
    compile: bool = False
    """Compile the transformer blocks with torch.compile."""
    skip: int = 0
    """Steps that may be skipped because their loss or gradient is not finite, or a spike; one more stops the run."""
    spike: float = 0.0
    """A gradient norm above this many times its running mean is a spike; 0: none is."""

    eval_every: int = 200
    """Steps between evaluations; 0: only at the end."""
    eval_limit: int = 2000
    """Most samples of each held-out set, evenly spaced."""
    checkpoint_every: int = 50
    """Steps between checkpoints; 0: only at the end (and on Ctrl-C)."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep."""
    eval_fraction: float = 0.1
    """Fraction of your own captions held out for evaluation."""
    held_out_by: tuple[str, ...] = ()
    """Fields of your own data by which that is chosen, read or not; none: those that are read. A fine-tune has those of
    the run before, so that neither learns from what the other is measured on."""
    without: tuple[str, ...] = ()
    """Streams that every sample lacks, in training and evaluation: an ablation. The data need not have their fields."""
    validate: bool = False
    """Learn without, and evaluate on, a tenth of the training concepts, and leave the held-out sets alone: to choose
    settings by."""
    train_fraction: float = 1.0
    """Fraction of the training samples to learn from, the same ones with every seed; held-out sets stay whole."""
    max_broken: float = 0.05
    """Fraction of unreadable images above which the run stops."""
    resolution: int = 48
    """Side at which your own images are kept, in pixels."""
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
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """On several ranks, which `torchrun` starts: the model whole on each, in shards over all of them, or in shards over
    some and replicated over these."""
    shard_ranks: int = 0
    """With hsdp: ranks that hold one replica; 0: those of a node."""
    timeout: float = 600.0
    """Seconds after which a rank gives up waiting for others."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "chunk", "keep_checkpoints", "eval_limit", "resolution"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("warmup", "eval_every", "checkpoint_every", "threads", "seed", "workers", "skip", "shard_ranks"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        for name in ("lr", "clip_grad", "timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        TableFormat(self.csv_separator, self.csv_img_key, self.csv_caption_key)  # validates them
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"tokens: expected at least 1, got {self.tokens}")
        if self.data_weights is not None:
            check_weights(self.data_weights)
        object.__setattr__(self, "labels", tuple(label for each in self.labels for label in each.split(",") if label))
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema: expected 0 <= ema < 1, got {self.ema}")
        if not 0 < self.train_fraction <= 1:
            raise ValueError(f"train_fraction: expected 0 < train_fraction <= 1, got {self.train_fraction}")
        if self.fresh and self.init is None:
            raise ValueError(f"fresh: expected none without init, got {', '.join(self.fresh)}")
        if self.spike != 0 and not self.spike > 1:
            raise ValueError(f"spike: expected 0 or more than 1, got {self.spike}")

    @classmethod
    def of(cls, recipe: str, **changes: Any) -> Config:
        """The settings of a recipe, with changes. Raise ValueError for an unknown recipe."""
        return cls(recipe=recipe, **{**load(recipe).settings, **changes})

    def wiring(self) -> Recipe:
        """The recipe with this run's changes. Raise ValueError for a setting that it does not have."""
        recipe = load(self.recipe)
        for transfer in self.transfers:
            recipe = transferred(with_leaves(recipe, transfer.parts_before), transfer)
        return with_leaves(recipe, self.parts)

    @property
    def folder(self) -> Path:
        return self.run if self.run is not None else Path("runs") / Path(self.recipe).stem

    @property
    def title(self) -> str:
        """What is learned: clip; of a fine-tuned run, classify group, from mae."""
        tasks = (f"{transfer.task} {transfer.label}".rstrip() for transfer in self.transfers)
        return ", from ".join(reversed([Path(self.recipe).stem, *tasks]))

    @property
    def table(self) -> TableFormat:
        return TableFormat(self.csv_separator, self.csv_img_key, self.csv_caption_key)


# Settings that a resumed run may change.
RESUMABLE = frozenset(
    {
        "run",
        "resume",
        "again",
        "eval_every",
        "eval_limit",
        "checkpoint_every",
        "keep_checkpoints",
        "tensorboard",
    }
    | {"device", "threads", "backend", "max_broken", "workers", "recompute", "skip"}
    | {"profile", "parallel", "shard_ranks", "timeout"}
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
        (inner, *_) = typing.get_args(hint)
        return tuple(_restore(inner, each) if dataclasses.is_dataclass(inner) else each for each in value)
    return Path(value) if hint is Path else value
