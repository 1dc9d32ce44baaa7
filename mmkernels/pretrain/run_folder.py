"""The folder of a run: what it stores, and which run may write to it.

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
        config: `config.folder` is created if missing. A non-empty folder is accepted only to resume the same run: its
            settings must agree with `config` in everything that affects the weights.

    Raises:
        RunFolderError: the folder is in use, or holds a run with other settings, or no run to resume.
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
            raise RunFolderError(f"{self.path} holds {holds}. Resume it with --resume, or name another with --run")
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.path / "config.json", json.dumps(to_dict(config), indent=2) + "\n")

    def keep_log_until(self, step: int) -> None:
        """Drop records after a checkpoint: those steps will run again."""
        kept = [record for record in self.records() if record.get("step", 0) <= step]
        write_whole(self.log, "".join(json.dumps(record) + "\n" for record in kept))

    def records(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The records in the log, without truncated or damaged lines."""
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
    """The config of the run in a folder. Raise RunFolderError if it is missing or unreadable."""
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
            f"{config.folder}: a resumed run keeps its settings, but {'; '.join(changed)}. Start a new run with --run"
        )


def write_whole(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically: a reader never sees, and a kill never leaves, half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
