"""`mmkernels export`: a run's model in a folder of its own, without what only training needs.

config.json  tokenizer.json  classes.json  model.safetensors  export.json
(filter.jsonl  the recipe, if it is your own file)
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save

from mmkernels.pretrain.load import stored_weights
from mmkernels.pretrain.run_folder import (
    EXPORTED,
    RunFolderError,
    as_stored,
    kept_files,
    stored_classes,
    stored_config,
)
from mmkernels.pretrain.tokenizer import TextTokenizer

__all__ = ["export", "main"]


def export(run: Path | str, path: Path | str) -> Path:
    """Write a model to a new folder: its newest weights, averaged if the run kept an average, and what it takes to use
    them. `load_model`, `mmkernels evaluate`, `finetune --from` and `pretrain --init` take that folder for a run. It has
    no state of the optimizer, so that the run cannot be resumed from it.

    Args:
        run: folder of a run, or of an exported model.
        path: the new folder; an empty one may be there.

    Returns:
        the new folder.

    Raises:
        RunFolderError: no run there, or no checkpoint yet; files in the new folder already.
        DamagedError: the checkpoint cannot be read.
    """
    source, target = Path(run), Path(os.path.abspath(path))  # "." has a name, too
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise RunFolderError(f"path: expected a new or an empty folder, got {path}, which holds files already")
    config, classes = stored_config(source), stored_classes(source)
    step, weights = stored_weights(source)
    tokenizer = TextTokenizer.load(source / "tokenizer.json").text()  # raises if it is damaged
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent) as beside:  # nobody else's
        partial = Path(beside) / "model"
        partial.mkdir()  # with the rights of any new folder
        for name, file in kept_files(config).values():
            shutil.copyfile(file, partial / name)
        stored = as_stored(dataclasses.replace(config, run=None, init=None, fresh=(), resume=False))
        texts = {"config.json": stored, "classes.json": classes, EXPORTED: {"step": step}}
        for name, value in texts.items():
            (partial / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        (partial / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
        (partial / "model.safetensors").write_bytes(save(weights))  # a path that is not UTF-8 is welcome, too
        os.replace(partial, target)
    return target


def main(argv: Sequence[str]) -> int:
    """Run `mmkernels export`; returns the exit status."""
    about = "Write a run's model to a folder of its own, which load_model, evaluate, finetune --from and --init read."
    parser = argparse.ArgumentParser(prog="mmkernels export", description=about)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("path", type=Path, help="the new folder")
    args = parser.parse_args(list(argv))
    try:
        made = export(args.run, args.path)
    except (ValueError, OSError) as error:
        print(f"mmkernels export: {error}", file=sys.stderr)
        return 1
    print(f"{args.path}: {sum(file.stat().st_size for file in made.iterdir()) / 1e6:.1f} MB")
    return 0
