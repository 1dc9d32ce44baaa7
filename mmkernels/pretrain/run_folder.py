"""The folder of a run: what it stores, and which run may write to it.

config.json  tokenizer.json  classes.json  log.jsonl  checkpoints/  tensorboard/  report.html
(filter.jsonl  the recipe, if it is your own file)
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmkernels.pretrain import checkpoint
from mmkernels.pretrain.config import RESUMABLE, Config, from_dict, to_dict
from mmkernels.pretrain.wiring import leaves

__all__ = [
    "EXPORTED",
    "RunFolder",
    "RunFolderError",
    "as_stored",
    "begun_before",
    "kept_files",
    "other_classes",
    "stored_classes",
    "stored_config",
    "stored_records",
    "stored_wiring",
    "write_whole",
]

_WIRING = "wiring"  # key of the recipe's settings in config.json
_LAST = "classes.json"  # of the files that a run begins with
_BEGINNING = "beginning.json"  # there while these are written: their names
_LAUNCHER = "launcher"  # key of config.json
_PARTIAL = ".partial"
EXPORTED = "export.json"  # of an exported model: the steps that were done


class RunFolderError(ValueError):
    """The folder holds another run, or not the one to resume."""


class RunFolder:
    """The folder of a run, which `begin` makes: until then nothing is written.

    Args:
        config: a `config.folder` with something in it is accepted only to resume the same run: its settings must agree
            with `config` in everything that affects the weights.

    Raises:
        RunFolderError: the folder is in use, or holds a run with other settings, or no run to resume.
    """

    def __init__(self, config: Config) -> None:
        self.path = config.folder
        self.checkpoints = self.path / "checkpoints"
        self.log = self.path / "log.jsonl"
        self.report = self.path / "report.html"
        self.tokenizer = self.path / "tokenizer.json"
        if config.resume:
            _check_same_run(self.path, config)
        else:
            self._expect_free()

    def _expect_free(self) -> None:
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            newest = checkpoint.latest(self.checkpoints)
            holds = f"a run, saved at {newest.name}" if newest else "files already"
            raise RunFolderError(f"{self.path} holds {holds}. Resume it with --resume, or name another with --run")

    def begin(self, config: Config, tokenizer: str, classes: Mapping[str, Sequence[str]]) -> None:
        """Make the folder, if it is missing, and store what a model cannot be built again without.

        Args:
            config: of the run.
            tokenizer: the whole of it, as JSON.
            classes: of the data's label fields.

        Raises:
            RunFolderError: another run has begun there meanwhile; the folder cannot be made.
        """
        if not config.resume:
            self._expect_free()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"run: expected a folder that can be made, got {self.path} ({error})") from error
        kept = {name: source for name, source in kept_files(config).values() if not _same(self.path / name, source)}
        if not config.resume:
            write_whole(self.path / _BEGINNING, json.dumps(["config.json", self.tokenizer.name, *kept, _LAST]))
        stored = {**as_stored(config), _LAUNCHER: launcher()}
        write_whole(self.path / "config.json", json.dumps(stored, indent=2) + "\n")
        for name, source in kept.items():
            write_whole(self.path / name, source.read_bytes())
        write_whole(self.tokenizer, tokenizer)
        write_whole(self.path / _LAST, json.dumps({name: list(each) for name, each in classes.items()}) + "\n")
        (self.path / _BEGINNING).unlink(missing_ok=True)

    def expect_classes(self, classes: Mapping[str, Sequence[str]]) -> None:
        """Raise RunFolderError unless the data's label fields have the classes that the run began with: its heads know
        them by their places."""
        for name, before in stored_classes(self.path).items():
            if (now := tuple(classes.get(name, ()))) != before:
                raise RunFolderError(
                    f"{self.path}: a resumed run keeps its classes, but {name} {other_classes(before, now)}. Start a "
                    "new run with --run"
                )

    def keep_log_until(self, step: int) -> list[int]:
        """Drop records after a checkpoint: those steps will run again. Damaged lines are dropped too.

        Returns:
            the numbers of the damaged lines.
        """
        records, damaged = _lines_of(self.log)
        kept = [record for record in records if record.get("step", 0) <= step]
        write_whole(self.log, "".join(json.dumps(record) + "\n" for record in kept))
        return damaged

    def records(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The records in the log, see `stored_records`."""
        return stored_records(self.path, kind)


def begun_before(config: Config) -> Config:
    """The config, to resume if a launcher starts the same command again and the run has begun: with --again, or in the
    restarts of torchrun (TORCHELASTIC_RESTART_COUNT) and of SLURM (SLURM_RESTART_COUNT), if it was begun by the same
    launcher. What a start has left that was killed before it had stored everything is removed."""
    restarts = (os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    restarted, folder = any(each not in ("", "0") for each in restarts), config.folder
    if config.resume or not (config.again or restarted):
        return config
    if (folder / _LAST).exists():
        ours = config.again or _launcher_of(folder) == launcher()
        return dataclasses.replace(config, resume=True) if ours else config
    if (folder / _BEGINNING).exists():
        for name in json.loads((folder / _BEGINNING).read_text(encoding="utf-8")):
            for path in (folder / name, folder / (name + _PARTIAL)):
                path.unlink(missing_ok=True)
        (folder / _BEGINNING).unlink()
    return config


def launcher() -> str:
    """What started this process: the same in restarts."""
    job = os.environ.get("SLURM_JOB_ID")
    return f"SLURM job {job}" if job else f"process {os.getppid()} of {socket.gethostname()}"


def _launcher_of(folder: Path) -> str:
    """What began the run in a folder, as its last file says."""
    stored: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return str(stored.get(_LAUNCHER, ""))


def stored_config(folder: Path) -> Config:
    """The config of the run in a folder. Raise RunFolderError if it is missing or unreadable."""
    path = folder / "config.json"
    if not path.exists():
        raise RunFolderError(f"{folder} holds no run (no config.json)")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        config: Config = from_dict({name: value for name, value in values.items() if name not in (_WIRING, _LAUNCHER)})
        copies = {setting: folder / name for setting, (name, _) in kept_files(config).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise RunFolderError(f"{path}: expected the settings of a run, got something else ({error})") from error
    here: dict[str, Any] = {setting: file for setting, file in copies.items() if file.is_file()}
    return dataclasses.replace(config, **here | {"recipe": str(here.get("recipe", config.recipe))})


def kept_files(config: Config) -> dict[str, tuple[str, Path]]:
    """Of each setting that names a file which a run keeps a copy of: (the copy's name in its folder, the file)."""
    found = {}
    if config.recipe.endswith(".py"):
        found["recipe"] = (Path(config.recipe).name, Path(config.recipe))
    if config.filter is not None:
        found["filter"] = ("filter.jsonl", config.filter)
    return found


def stored_records(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The records in the log of the run in a folder, without a last line that is unfinished: a run that writes it, or
    was killed then, leaves it so.

    Args:
        folder: of the run. Without a log there are no records.
        kind: of the records; None: of all kinds.

    Raises:
        RunFolderError: another line is damaged.
    """
    log = folder / "log.jsonl"
    records, damaged = _lines_of(log)
    if damaged:
        raise RunFolderError(
            f"{log}: expected a record in each line, got something else in line {', '.join(map(str, damaged[:5]))}"
            f"{' and others' if len(damaged) > 5 else ''}. Mend or delete what is damaged; --resume leaves it out, too"
        )
    return [record for record in records if kind in (None, record.get("kind"))]


def _lines_of(log: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """(the records, the numbers of the damaged lines) of a log; blank lines and an unfinished last one are neither."""
    *lines, last = (log.read_bytes() if log.exists() else b"").split(b"\n")
    records, damaged = [], []
    for number, line in enumerate([*lines, last], 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif line.strip() and number <= len(lines):
            damaged.append(number)
    return records, damaged


def stored_wiring(folder: Path) -> dict[str, Any]:
    """Every setting of the recipe of the run in a folder, by dotted name; `stored_config` has the others."""
    wiring: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8")).get(_WIRING, {})
    return wiring


def stored_classes(folder: Path) -> dict[str, tuple[str, ...]]:
    """The label fields of a run's data, and the names of their classes. Raise RunFolderError if they are unreadable."""
    path = folder / _LAST
    try:
        return {name: tuple(names) for name, names in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RunFolderError(f"{path}: expected the classes of a run's labels, got something else ({error})") from error


def as_stored(config: Config) -> dict[str, Any]:
    """What config.json has: the settings, with files that are kept beside it by their names there, and every setting of
    the recipe, which may change before a resumption."""
    wiring: dict[str, Any] = json.loads(json.dumps(leaves(config.wiring()), default=str))
    return {**to_dict(config), **{setting: name for setting, (name, _) in kept_files(config).items()}, _WIRING: wiring}


def _check_same_run(folder: Path, config: Config) -> None:
    if (folder / EXPORTED).exists():
        raise RunFolderError(
            f"{folder} holds an exported model, which cannot be resumed. Begin a new run with "
            f"pretrain --init {folder}, or with finetune --from {folder}"
        )
    stored = to_dict(stored_config(folder))  # with the defaults of settings that its version did not have
    before = {**stored, **json.loads((folder / "config.json").read_text(encoding="utf-8"))}
    now = as_stored(config)
    for setting, (name, source) in kept_files(config).items():
        if (kept := folder / name).is_file() and kept.read_bytes() != source.read_bytes():
            raise RunFolderError(
                f"{setting}: expected the file that this run began with, kept as {kept}, got another in {source}"
            )
    before.pop(_LAUNCHER, None)
    before |= before.pop(_WIRING, {})
    now |= now.pop(_WIRING)
    fixed = [name for name in {**before, **now} if name not in RESUMABLE and name != "parts"]
    changed = [f"{name}: {before.get(name)} -> {now.get(name)}" for name in fixed if before.get(name) != now.get(name)]
    if changed:
        raise RunFolderError(
            f"{config.folder}: a resumed run keeps its settings, but {'; '.join(changed)}. Start a new run with --run"
        )


def other_classes(before: Sequence[str], now: Sequence[str]) -> str:
    """How the classes of a label have changed, in words."""
    lost, new = ([each for each in some if each not in rest] for some, rest in ((before, now), (now, before)))
    changes = [f"{word} {', '.join(names[:5])}" for word, names in (("has lost", lost), ("has gained", new)) if names]
    return " and ".join(changes) or "has them in another order"


def _same(path: Path, other: Path) -> bool:
    return path.exists() and path.samefile(other)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file atomically, text as UTF-8: a reader never sees, and a kill never leaves, half of it."""
    partial = path.with_name(path.name + _PARTIAL)
    partial.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    os.replace(partial, path)
