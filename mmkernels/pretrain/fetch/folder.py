"""A data folder in the making: pictures, sounds, one table, licences. It appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

from mmkernels.pretrain.data.unicode import unicode_fault
from mmkernels.pretrain.fetch.apt import FetchError, own_folder
from mmkernels.pretrain.fetch.deb import Deb

__all__ = ["DataFolder", "finished"]

MOST_PIXELS = 64_000_000  # of a picture: decoded, a quarter of a gigabyte
_LONGEST = 200  # bytes of a name
_ABOUT = "fetched.json"
_TABLE = "captions.jsonl"


def finished(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a finished folder of the same settings holds; None if there is no folder.

    Raises:
        FetchError: something else is there.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        about: dict[str, Any] = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        before = about["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        raise FetchError(f"{folder} holds files already. Name another folder with --out") from None
    now = json.loads(json.dumps(dict(settings)))
    if before != now:
        changed = [
            f"{name}: {before.get(name)} -> {now.get(name)}" for name in now if before.get(name) != now.get(name)
        ]
        raise FetchError(
            f"{folder} holds this data with other settings ({'; '.join(changed)}). Name another with --out"
        )
    return about


class DataFolder:
    """The folder, as a context: on leaving it without an error, everything moves to its place.

    Args:
        place: where it appears.
        side: the longer side of a stored picture, at most, in pixels.
    """

    def __init__(self, place: Path, side: int) -> None:
        self.place, self.side = place, side
        self.path = place.with_name(f".{place.name}.partial")
        self.rows: list[dict[str, Any]] = []
        self.left_out: Counter[str] = Counter()
        self._seen: set[bytes] = set()
        busy = f"{place} is being made by another process. Wait for it, or name another with --out"
        self._own = own_folder(self.path, busy)

    def __enter__(self) -> DataFolder:
        self._own.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if self.place.is_dir():
                    self.place.rmdir()  # empty, as `finished` checked
                os.replace(self.path, self.place)
        except OSError as fault:
            raise FetchError(f"{self.place}: expected a free place for the folder ({fault.strerror})") from fault
        finally:
            self._own.__exit__(None, None, None)

    def picture(self, path: str, content: bytes) -> str:
        """Store a picture, shrunk to fit; returns its place in the folder, or "" if it is left out."""
        from PIL import Image

        digest = hashlib.sha256(content).digest()
        if digest in self._seen:
            return self.leave_out("pictures the same as another")
        place = self._new("images", str(PurePosixPath(path).with_suffix(".png")))
        if not place:
            return self.leave_out("files whose name cannot be used, or is another's")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
                opened = Image.open(BytesIO(content))
            if opened.width * opened.height > MOST_PIXELS:
                raise Image.DecompressionBombError
            image = opened.convert("RGBA")
        except Image.DecompressionBombError:
            return self.leave_out(f"pictures larger than {MOST_PIXELS // 10**6} megapixels")
        except Exception:  # decoders raise anything on broken files
            return self.leave_out("pictures that cannot be decoded")
        factor = min(1.0, self.side / max(image.size))
        size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
        if size != image.size:
            image = image.resize(size, Image.Resampling.LANCZOS)
        self._seen.add(digest)
        image.save(self.path / place, "PNG")
        return place

    def sound(self, path: str, content: bytes) -> str:
        """Store a sound as it is; returns its place in the folder, or "" if it is left out."""
        place = self._new("audio", path)
        if not place:
            return self.leave_out("files whose name cannot be used, or is another's")
        (self.path / place).write_bytes(content)
        return place

    def leave_out(self, reason: str, count: int = 1) -> str:
        """Count what is left out: "3 pictures without a caption"; returns ""."""
        if count:
            self.left_out[reason] += count
        return ""

    def drop(self, place: str, reason: str) -> None:
        """Take a stored file back."""
        (self.path / place).unlink()
        self.leave_out(reason)

    def licence(self, package: str, content: bytes) -> None:
        path = self.path / "LICENSES" / f"{package}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)

    def finish(self, readme: str, settings: Mapping[str, Any], debs: Mapping[str, Deb]) -> dict[str, Any]:
        """Write the table and what the folder is; returns the latter. `readme` is a format of its facts."""
        if not self.rows:
            raise FetchError(f"expected pictures with captions in {', '.join(debs)}, got none: {self.summary()}")
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows)
        (self.path / _TABLE).write_text(lines, encoding="utf-8")
        about: dict[str, Any] = {
            "settings": dict(settings),
            "packages": {name: deb.control["Version"] for name, deb in debs.items()},
            "rows": len(self.rows),
            "images": len({row["image"] for row in self.rows}),
            "sounds": sum("audio" in row for row in self.rows),
            "left_out": dict(self.left_out),
        }
        packages = " and ".join(f"{name} {version}" for name, version in about["packages"].items())
        facts = {**about, "packages": packages, "side": self.side, "left_out": self.summary()}
        (self.path / "README.md").write_text(readme.format(**facts), encoding="utf-8")
        (self.path / _ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        return about

    def summary(self) -> str:
        """What was left out, by reason."""
        return ", ".join(f"{count} {reason}" for reason, count in self.left_out.most_common()) or "nothing left out"

    def _new(self, kind: str, path: str) -> str:
        """A place in the folder for a file of a package, with its folder; "" if its name is unusable, or taken."""
        name = PurePosixPath(path)
        if unicode_fault(path) or name.is_absolute() or not name.parts or ".." in name.parts:
            return ""
        if any(len(part.encode()) > _LONGEST for part in name.parts):
            return ""
        place = PurePosixPath(kind, name)
        try:
            if (self.path / place).exists():
                return ""
            (self.path / place).parent.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError):  # too long in all, below a file, or with a NUL
            return ""
        return str(place)
