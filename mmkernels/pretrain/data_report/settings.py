"""The options of `mmkernels data-report`."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import tyro

from mmkernels.pretrain.data import TableFormat
from mmkernels.pretrain.data.unicode import printable
from mmkernels.pretrain.data_report.kinds import chosen

__all__ = ["DataReport"]

# What decides which training samples there are, and what they are called.
_OF_TABLES = ("csv_separator", "csv_img_key", "csv_caption_key")
_AS_IN_TRAINING = ("without", "labels", *_OF_TABLES, "eval_fraction", "held_out_by")


@dataclass(frozen=True)
class DataReport:
    """Describe a data set on one page, and find what is wrong with it. Nothing is changed or deleted."""

    source: tyro.conf.Positional[str]
    """As --data of mmkernels pretrain: emoji, scenes, folder:PATH, webdataset:PATTERN, hf:NAME, several with :: ..."""
    out: Path | None = None
    """Folder of the report; default data-reports/ and the source's name. A report of other data there is replaced only
    if the folder is named here."""
    drop: tuple[str, ...] = ()
    """Write a list of training samples to leave out, drop.jsonl, which mmkernels pretrain --filter reads. Some of
    broken, empty, boilerplate, long, script, blank, duplicates, near-duplicates, same-picture, leaked, with commas or
    spaces in between. Of duplicates the first stays; of a leak the held-out sample does."""
    recipe: str | None = None
    """Read what this recipe reads, as its training does; default: every field that the data are known to have."""
    without: tuple[str, ...] = ()
    """Streams of the recipe whose fields the data may lack, as in training."""
    labels: tuple[str, ...] = ()
    """Further columns of your own data whose values are classes, as in training."""
    csv_separator: str | None = None
    """Field separator of a .csv or .tsv; None: a tab in a .tsv, else a comma."""
    csv_img_key: str = "image"
    """Column of a table (key of a .jsonl) with the images' paths."""
    csv_caption_key: str = "caption"
    """Column of a table (key of a .jsonl) with the captions."""
    eval_fraction: float = 0.1
    """Fraction of your own captions held out, as in training: leaks are looked for between the two."""
    held_out_by: tuple[str, ...] = ()
    """Fields of your own data by which that is chosen, as in training; none: those that are read."""
    resolution: int = 48
    """Side at which your own images are compared, in pixels."""
    limit: int | None = None
    """Read at most this many samples of each split, evenly spaced; None: all."""
    run: Path | None = None
    """Folder of a run: its tokenizer counts, and its embeddings are shown; default: a tokenizer trained on the texts,
    pixels and words."""
    vocabulary: int = 2048
    """Most tokens of the tokenizer that is trained, as in training."""
    max_tokens: int = 128
    """Tokens above which a caption is too long; the default is what the encoder of subwords reads."""
    batch: int = 128
    """Samples of a batch, to see what padding wastes."""
    tokens: int = 8192
    """Tokens of a pack, to see what packing gains."""

    def __post_init__(self) -> None:
        for name in ("resolution", "batch", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit: expected at least 1, got {self.limit}")
        if self.max_tokens < 3:
            raise ValueError(f"max_tokens: expected at least 3, two of which mark the ends, got {self.max_tokens}")
        if self.without and self.recipe is None:
            raise ValueError(
                f"recipe: expected one, whose streams are meant, got none, without {', '.join(self.without)}"
            )
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"eval_fraction: expected 0 <= eval_fraction < 1, got {self.eval_fraction}")
        object.__setattr__(self, "drop", chosen(self.drop))
        object.__setattr__(self, "labels", tuple(label for each in self.labels for label in each.split(",") if label))
        _ = self.table  # validates it

    @property
    def table(self) -> TableFormat:
        return TableFormat(self.csv_separator, self.csv_img_key, self.csv_caption_key)

    @property
    def folder(self) -> Path:
        """Of the report."""
        if self.out is not None:
            return self.out
        parts = (re.sub("^(folder|webdataset|hf):", "", printable(part)) for part in self.source.split("::"))
        last = "=".join(part.rstrip("/").rpartition("/")[2] for part in parts)
        name = re.sub(r"[^\w.=-]+", "-", last).strip("-.")
        return Path("data-reports") / os.fsdecode((name or "data").encode())  # whatever the locale's encoding is

    def training(self, recipe: str | None) -> str:
        """The command that trains with a recipe, without what the list names. None: the default recipe."""
        words = [] if recipe is None else ["--recipe", recipe]
        words += ["--data", self.source, "--filter", str(self.folder / "drop.jsonl")]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in _AS_IN_TRAINING and value != field.default:
                words += [f"--{field.name.replace('_', '-')}", *(map(str, value if field.default == () else [value]))]
        return shlex.join(["mmkernels", "pretrain", *words])
