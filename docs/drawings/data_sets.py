"""Draw the pictures of the data sets: `data-emoji.png`, `data-scenes.png` and `data-motion.png` in `docs/images`.

    python docs/drawings/data_sets.py            # writes the pictures
    python docs/drawings/data_sets.py --check    # draws in memory and compares the pixels

Needs `mmkernels[pretrain]`.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmkernels.pretrain.data.emoji import HELD_OUT_VENDOR, load_pack
from mmkernels.pretrain.data.motion import ACTIONS, MotionSource
from mmkernels.pretrain.data.motion import ANSWERS as MOTION_ANSWERS
from mmkernels.pretrain.data.scene_text import ANSWERS, KINDS
from mmkernels.pretrain.data.scenes import SceneSource

IMAGES = Path(__file__).resolve().parents[1] / "images"
INK, BOX = "#2b2d42", "#d1495b"
ZOOM, GAP, LINE, WIDTH = 4, 12, 15, 720


def enlarged(image: np.ndarray, zoom: int) -> Image.Image:
    return Image.fromarray(image.repeat(zoom, 0).repeat(zoom, 1))


def write(pen: ImageDraw.ImageDraw, x: int, y: int, lines: list[str]) -> None:
    font = ImageFont.load_default(size=12)
    for i, line in enumerate(lines):
        pen.text((x, y + i * LINE), line, fill=INK, font=font)


EMOJI = ("red apple", "octopus", "accordion", "face with tears of joy", "sailboat", "woman judge")


def emoji() -> Image.Image:
    """Every vendor's drawing of a few concepts, with the name and the keywords, and the split of each drawing."""
    pack = load_pack()
    vendors = [*(vendor for vendor in pack.vendors if vendor != HELD_OUT_VENDOR), HELD_OUT_VENDOR]
    side = 2 * pack.vendors[HELD_OUT_VENDOR].indices.shape[1]
    step, top = side + 8, GAP + LINE
    page = Image.new("RGB", (GAP + len(vendors) * step + 220, top + len(EMOJI) * (side + GAP)), "white")
    pen = ImageDraw.Draw(page)
    for column, vendor in enumerate(vendors):
        write(pen, GAP + column * step, 4, [vendor])
        drawings = pack.vendors[vendor]
        for row, name in enumerate(EMOJI):
            for found in np.flatnonzero(drawings.concepts == pack.names.index(name)):
                image = Image.fromarray(drawings.palette[drawings.indices[found]])
                image = image.resize((side, side), Image.Resampling.NEAREST)
                page.paste(image, (GAP + column * step, top + row * (side + GAP)), image)
    for row, name in enumerate(EMOJI):
        concept = pack.names.index(name)
        splits = "B, and C" if concept in pack.held_out else "train, and A"
        lines = [name, *textwrap.wrap(", ".join(pack.keywords[concept]), 34)[:3], f"{splits} in {HELD_OUT_VENDOR}"]
        write(pen, GAP + len(vendors) * step + 4, top + row * (side + GAP) + 8, lines)
    return page


def scenes() -> Image.Image:
    """One scene of each kind of question: its boxes, two captions, the question, the pair, the regions' crops."""
    source = SceneSource("train", size=200)
    indices = [next(i for i in range(8, 200) if source.drawn(i).kind == kind) for kind in range(len(KINDS))]
    side = 48 * ZOOM
    page = Image.new("RGB", (WIDTH, len(indices) * (side + GAP) + GAP), "white")
    pen = ImageDraw.Draw(page)
    for row, index in enumerate(indices):
        sample, top = source[index], GAP + row * (side + GAP)
        values = sample.values
        page.paste(enlarged(values["image"], ZOOM), (GAP, top))
        for box in (values["regions"].boxes * side).tolist():
            left, upper, right, lower = (round(edge) for edge in box)
            pen.rectangle((GAP + left, top + upper, GAP + right - 1, top + lower - 1), outline=BOX)
        pair = [source.classes["tag"][tag] for tag in values["pair"].tags]
        lines = [f"text: {caption}" for caption in sample.captions[:3]]
        lines += [
            f"question: {values['question'].captions[0]}   answer: {ANSWERS[values['answer']]}   "
            f"kind: {KINDS[values['kind']]}",
            f"pair: {pair[0]}, {pair[1]}   relation: {source.classes['relation'][values['relation']]}",
            f"group: {source.classes['group'][values['group']]}   tags: {values['tags'].captions[0]}   regions:",
        ]
        write(pen, side + 2 * GAP, top + 4, lines)
        for i, crop in enumerate(values["regions"].crops):
            page.paste(enlarged(crop, ZOOM), (side + 2 * GAP + i * (12 * ZOOM + 6), top + 4 + LINE * len(lines) + 8))
    return page


def motion() -> Image.Image:
    """One clip of each action: its frames, a caption, and the question."""
    source = MotionSource("train", size=300)
    indices = [next(i for i in range(40, 300) if source.clip(i).action == action) for action in range(len(ACTIONS))]
    zoom = 2
    side = 32 * zoom
    page = Image.new("RGB", (WIDTH, len(indices) * (side + GAP) + GAP), "white")
    pen = ImageDraw.Draw(page)
    for row, index in enumerate(indices):
        sample, top = source[index], GAP + row * (side + GAP)
        for i, frame in enumerate(sample.values["video"]):
            page.paste(enlarged(frame, zoom), (GAP + i * (side + 3), top))
        answer = MOTION_ANSWERS[sample.values["answer"]]
        lines = [sample.captions[0], sample.values["question"].captions[0], answer]
        write(pen, 2 * GAP + 8 * (side + 3), top + 8, lines)
    return page


PICTURES = {"data-emoji": emoji, "data-scenes": scenes, "data-motion": motion}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for name, draw in PICTURES.items():
        path, page = IMAGES / f"{name}.png", draw()
        if not check:
            page.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
        elif not path.exists() or not same(Image.open(path), page):
            stale.append(path.name)
    if stale:
        print(f"out of date: {', '.join(stale)}", file=sys.stderr)
    return 1 if stale else 0


def same(stored: Image.Image, page: Image.Image) -> bool:
    """Whether two pictures differ by no more than the 256 colours in which the first is stored."""
    if stored.size != page.size:
        return False
    difference = np.abs(np.asarray(stored.convert("RGB"), int) - np.asarray(page, int))
    return bool(difference.mean() < 6 and (difference.max(2) > 96).mean() < 1e-3)


if __name__ == "__main__":
    sys.exit(main())
