"""From an emoji to palette indices: find its SVG in a vendor's icon set, rasterise, quantise."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import resvg_py
from emoji_sources import Concept, family, strip_fe0f
from pack_files import Source
from PIL import Image

SIZE = 48  # pixels: about 15% more bytes than 32 px, with room for crops and zooms at 32 px training resolution
COLOURS = 128  # per vendor: 2.4 MB in all, against 2.7 MB and 3 dB more with 256


class IconSet:
    """One vendor's icons, by name, or by code point if the set has a `chars.json`."""

    def __init__(self, source: Source) -> None:
        self.data = source.json("icons.json")
        self.icons: dict[str, dict[str, Any]] = self.data["icons"]
        self.aliases: dict[str, dict[str, Any]] = self.data.get("aliases", {})
        self.by_code = {strip_fe0f(code): name for code, name in source.json("chars.json").items()}

    def names_of(self, code: str) -> list[str]:
        """The name of a code point in this set, then the aliases of that name."""
        name = self.by_code.get(code)
        if name is None:
            return []
        return [name, *(alias for alias, to in self.aliases.items() if to["parent"] == name and set(to) == {"parent"})]

    def svg(self, name: str) -> str | None:
        """The SVG of an icon or alias (flips and quarter turns applied), drawn on a centred square; None if absent."""
        transform = ""
        extra: dict[str, Any] = {}
        while name not in self.icons:
            if name not in self.aliases:
                return None
            extra = {**self.aliases[name], **extra}
            name = self.aliases[name]["parent"]
        icon = self.icons[name]
        left, top = icon.get("left", 0), icon.get("top", 0)
        width = icon.get("width", self.data.get("width", 16))
        height = icon.get("height", self.data.get("height", 16))
        x, y = left + width / 2, top + height / 2
        if extra.get("hFlip") or extra.get("vFlip") or extra.get("rotate"):
            flip = f"scale({-1 if extra.get('hFlip') else 1} {-1 if extra.get('vFlip') else 1})"
            turn = f"rotate({90 * extra.get('rotate', 0)})"
            transform = f' transform="translate({x} {y}) {turn} {flip} translate({-x} {-y})"'
        side = max(width, height)
        box = f"{x - side / 2} {y - side / 2} {side} {side}"
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{box}" width="{side}" height="{side}"><g{transform}>{icon["body"]}</g></svg>'
        )


def slug(label: str) -> str:
    """The icon name of a label; empty if the label has characters that no name can have (`UP! button`)."""
    if re.search(r"[!#*]", label):
        return ""
    return re.sub(r"[^a-z0-9]+", "-", label.lower().replace("'", "").replace("’", "")).strip("-")


def find_svgs(icon_set: IconSet, named: list[IconSet], concepts: list[Concept]) -> list[str | None]:
    """A vendor's drawing of each concept.

    Sets without code points are searched by name: the label's own, then the names that other sets use for the same code
    point. Two concepts may then claim a drawing, such as `man running` and `person running`. It goes to the one that
    claims it by its name rather than by an alias, or to neither if they are of different families.
    """
    if icon_set.by_code:
        found = [icon_set.names_of(concept.code)[:1] for concept in concepts]
        return [icon_set.svg(names[0]) if names else None for names in found]
    claims: dict[str, list[tuple[bool, int]]] = {}
    for i, concept in enumerate(concepts):
        names = [slug(concept.name), *(name for other in named for name in other.names_of(concept.code))]
        name = next((name for name in names if icon_set.svg(name) is not None), None)
        if name is not None:
            claims.setdefault(icon_set.svg(name) or "", []).append((name in icon_set.aliases, i))
    svgs: list[str | None] = [None] * len(concepts)
    for svg, claimants in claims.items():
        if len({family(concepts[i].name) for _, i in claimants}) == 1:
            svgs[min(claimants)[1]] = svg
    return svgs


def rasterise(svg: str) -> np.ndarray:
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True)
    image = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))
    if image.shape != (SIZE, SIZE, 4):
        raise ValueError(f"rasterise: expected {SIZE} x {SIZE}, got {image.shape}")
    return image


def quantise(images: np.ndarray, rounds: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Images [n, S, S, 4] to palette indices [n, S, S] and a straight-alpha palette [128, 4], by weighted k-means.

    Distances are in premultiplied colour, where invisible colours have no weight. Colours are first binned to 5 bits
    per channel, so that k-means sees some ten thousand weighted points instead of millions of pixels.
    """
    pixels = images.reshape(-1, 4).astype(np.uint32)
    alpha = pixels[:, 3:]
    premultiplied = np.concatenate([(pixels[:, :3] * alpha + 127) // 255, alpha], 1)
    binned = premultiplied >> 3
    keys = (binned[:, 0] << 15) | (binned[:, 1] << 10) | (binned[:, 2] << 5) | binned[:, 3]
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    inverse = inverse.reshape(-1)
    sums = np.stack([np.bincount(inverse, premultiplied[:, c]) for c in range(4)], 1)
    points = sums / counts[:, None]  # mean colour of each bin
    weights = np.sqrt(counts.astype(np.float64))  # otherwise flat areas would take the whole palette
    centres = np.zeros((COLOURS, 4))  # entry 0 stays fully transparent
    distance = ((points - centres[0]) ** 2).sum(1)
    for i in range(1, COLOURS):  # weighted farthest-point start: deterministic, and covers every colour
        centres[i] = points[np.argmax(distance * weights)]
        distance = np.minimum(distance, ((points - centres[i]) ** 2).sum(1))
    for _ in range(rounds):
        nearest = _nearest(points, centres)
        mass = np.bincount(nearest, weights, COLOURS)
        moved = np.stack([np.bincount(nearest, weights * points[:, c], COLOURS) for c in range(4)], 1)
        centres[1:] = np.where(mass[1:, None] > 0, moved[1:] / np.maximum(mass[1:, None], 1e-9), centres[1:])
    centres = np.rint(centres)
    order = np.lexsort((centres @ [0.299, 0.587, 0.114, 0.0], centres[:, 3]))  # similar neighbours deflate better
    centres = centres[order]
    indices = _nearest(points, centres)[inverse].astype(np.uint8).reshape(images.shape[:3])
    opacity = np.maximum(centres[:, 3:], 1)
    straight = np.where(centres[:, 3:] > 0, np.minimum(centres[:, :3] * 255 / opacity, 255), 0)
    return indices, np.rint(np.concatenate([straight, centres[:, 3:]], 1)).astype(np.uint8)


def _nearest(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    best = [
        ((chunk[:, None, :] - centres[None]) ** 2).sum(2).argmin(1)  # [4096, 128, 4], no BLAS: the same everywhere
        for chunk in (points[i : i + 4096] for i in range(0, len(points), 4096))
    ]
    return np.concatenate(best)


def psnr(images: np.ndarray, indices: np.ndarray, palette: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of the visible image over white."""
    error = []
    for original, index in zip(images, indices, strict=True):
        a, b = (_over_white(x) for x in (original, palette[index]))
        error.append(((a - b) ** 2).mean())
    return float(10 * np.log10(255**2 / np.mean(error)))


def _over_white(image: np.ndarray) -> np.ndarray:
    alpha = image[..., 3:].astype(np.float64) / 255
    return image[..., :3] * alpha + 255 * (1 - alpha)
