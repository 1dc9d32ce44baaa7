"""A folder of pictures salted with known faults, for the tests of data reports."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image

from mmkernels.pretrain.data.scenes import open_scenes
from mmkernels.pretrain.data.seeds import is_held_out

FRACTION = 0.2  # held out


def caption_in(held_out: bool, words: str) -> str:
    """A caption that the split by hash puts there."""
    return next(text for i in count() if is_held_out(text := f"{words} {i}", FRACTION) == held_out)


class Salted:
    """Clean pictures first, faulty ones after them.

    Attributes:
        faults: kind -> the names that a report must find, and no others.
        clean: names of what is in order.
    """

    def __init__(self, folder: Path, clean: int = 40) -> None:
        self.folder = folder
        folder.mkdir()
        self.rows: list[dict[str, object]] = []
        self.faults: dict[str, set[str]] = {}
        self._scenes = iter(open_scenes(fields=("image", "text"), size=400, resolution=96).train)
        self.clean = [self.add(f"clean {i}.png", *self.scene()) for i in range(clean)]
        self._copies()
        self._captions()
        self._unreadable()
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows)
        (folder / "captions.jsonl").write_text(lines, encoding="utf-8")

    def scene(self) -> tuple[Image.Image, str]:
        """A picture and a caption that nothing else has."""
        sample = next(self._scenes)
        return Image.fromarray(sample.image), f"{sample.captions[0]}, no {len(self.rows)}"

    def add(self, name: str, image: Image.Image | bytes, caption: object, kind: str = "") -> str:
        path = self.folder / name
        if isinstance(image, bytes):
            path.write_bytes(image)
        else:
            image.save(path, quality=75)
        self.rows.append({"image": name, "caption": caption})
        if kind:
            self.faults.setdefault(kind, set()).add(name)
        return name

    def _copies(self) -> None:
        def opened(i: int) -> tuple[Image.Image, object]:
            return Image.open(self.folder / f"clean {i}.png"), self.rows[i]["caption"]

        for i in range(3):
            self.add(f"copy {i}.png", (self.folder / f"clean {i}.png").read_bytes(), opened(i)[1], "duplicates")
        changes = {
            "again.jpg": lambda image: image,
            "small.png": lambda image: image.resize((48, 48), Image.Resampling.LANCZOS),
            "large.jpg": lambda image: image.resize((150, 150), Image.Resampling.BICUBIC),
            "dark.png": lambda image: image.point(lambda value: round(0.85 * value)),
            "brighter.png": lambda image: image.point(lambda value: min(255, value + 15)),
        }
        for i, (name, change) in enumerate(changes.items(), 3):
            image, caption = opened(i)
            self.add(name, change(image), f"  {str(caption).upper()} ", "near-duplicates")
        held_out = [i for i in range(8, 40) if is_held_out(str(self.rows[i]["caption"]), FRACTION)]
        trained = [i for i in range(8, 40) if i not in held_out]
        for i, n in zip(held_out, range(3), strict=False):
            image = opened(i)[0] if n else opened(i)[0].resize((60, 60))
            self.add(f"leak {n}.png", image, caption_in(False, f"another thing {n}"), "leaked")
        self.add("second view.jpg", opened(trained[0])[0], caption_in(False, "said otherwise"), "same-picture")
        for n, colour in enumerate(("white", "teal")):
            self.add(f"plain {n}.png", Image.new("RGB", (40, 30), colour), f"a plain wall {n}", "blank")

    def _captions(self) -> None:
        bad = {
            "boilerplate": [
                "IMG_1234.jpg",
                "see https://a.b/c",
                "<b>kite</b> &amp; sea",
                "Image of",
                "stock photo, sea",
            ],
            "empty": ["...", " —!? "],
            "long": ["a very long description of a small thing " * 40],
            "script": ["красный змей над морем"],
        }
        for kind, captions in bad.items():
            for n, caption in enumerate(captions):
                self.add(f"{kind} {n}.png", self.scene()[0], caption, kind)
        for n in range(12):
            self.add(f"shared {n}.png", self.scene()[0], "Our spring collection", "boilerplate")
        for caption in ("", "  ", [], ["", " "], None):
            self.add(f"nothing {len(self.rows)}.png", self.scene()[0], caption)
            self.faults["empty"].add(f"captions.jsonl: line {len(self.rows)}")

    def _unreadable(self) -> None:
        out = io.BytesIO()
        image, caption = self.scene()
        image.save(out, "PNG")
        self.add("cut.png", out.getvalue()[:300], caption, "broken")
        self.add("text.png", b"this is no picture", self.scene()[1], "broken")
        self.add("gone.png", b"", self.scene()[1], "broken")
        (self.folder / "gone.png").unlink()
        self.rows.append({"caption": "a row without a picture"})
        self.faults["broken"].add(f"captions.jsonl: line {len(self.rows)}")


def pixels(seed: int, side: int = 64) -> np.ndarray:
    """Smooth random pictures, uint8 [side, side, 3]: all different."""
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


def names(findings: Iterator[object], kind: str) -> set[str]:
    return {each.name for each in findings if each.kind == kind}  # type: ignore[attr-defined]
