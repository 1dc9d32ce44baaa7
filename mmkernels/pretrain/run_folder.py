"""The folder of a run: who may write into it, and what it remembers.

config.json  log.jsonl  checkpoints/  tensorboard/  report.html
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mmkernels.pretrain import checkpoint
from mmkernels.pretrain.config import RESUMABLE, Config, from_dict, to_dict

__all__ = ["RunFolder", "RunFolderError", "stored_config"]


class RunFolderError(ValueError):
    """The folder holds another run, or not the one to resume."""


class RunFolder:
    """An opened run folder.

    Args:
        config: `config.folder` is made if it does not exist. One that holds anything is taken only to resume the same
            run: its settings must agree with `config` in all that shapes the weights.

    Raises:
        RunFolderError: the folder is taken, or holds a run with other settings, or none.
    """

    def __init__(self, config: Config) -> None:
        self.path = config.folder
        self.checkpoints = self.path / "checkpoints"
        self.log = self.path / "log.jsonl"
        self.report = self.path / "report.html"
        if config.resume:
            _check_same_run(stored_config(self.path), config)
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            newest = checkpoint.latest(self.checkpoints)
            holds = f"a run, saved at {newest.name}" if newest else "files already"
            raise RunFolderError(f"{self.path} holds {holds}. Go on with it by --resume, or name a new one by --run")
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.path / "config.json", json.dumps(to_dict(config), indent=2) + "\n")

    def keep_log_until(self, step: int) -> None:
        """Forget what was logged after a checkpoint: those steps are taken again."""
        kept = [record for record in self.records() if record.get("step", 0) <= step]
        write_whole(self.log, "".join(json.dumps(record) + "\n" for record in kept))

    def records(self, kind: str | None = None) -> list[dict[str, Any]]:
        """What was logged, less a last line that a kill cut short and lines that the disk has damaged."""
        records = []
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        for line in text.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and kind in (None, record.get("kind")):
                records.append(record)
        return records


def stored_config(folder: Path) -> Config:
    """The config of the run in a folder. Raises RunFolderError if there is none, or none that can be read."""
    path = folder / "config.json"
    if not path.exists():
        raise RunFolderError(f"{folder} holds no run to resume (no config.json)")
    try:
        config: Config = from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError) as error:
        raise RunFolderError(f"{path}: expected the settings of a run, got something else ({error})") from error
    return config


def _check_same_run(stored: Config, config: Config) -> None:
    before, now = to_dict(stored), to_dict(config)
    fixed = [name for name in now if name not in RESUMABLE]
    changed = [f"{name}: {before[name]} -> {now[name]}" for name in fixed if before[name] != now[name]]
    if changed:
        raise RunFolderError(
            f"{config.folder}: a resumed run keeps its settings, but {'; '.join(changed)}. Start a new one by --run"
        )


def write_whole(path: Path, text: str) -> None:
    """Write a file, in UTF-8, so that a reader, or a kill, never sees half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
