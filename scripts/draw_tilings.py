"""Draw the docs' pictures, `docs/images/*.svg`: how the kernels and the planner split their work.

    python scripts/draw_tilings.py            # writes the pictures
    python scripts/draw_tilings.py --check    # draws in memory and compares

The contents come from the package where Python determines them (tile states of a mask, packs of a plan), and from the
families' READMEs where only a kernel does (the order of InfoNCE's tiles). Needs `mmkernels[plot]`.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from mmkernels import AttentionMask, Modality, plan_packing
from mmkernels.ops.attention.tiles import tile_states

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
INK, QUIET, ROW, COLUMN, BOTH = "#2b2d42", "#d9dce3", "#2a9d8f", "#e9c46a", "#9d4edd"
SKIP, PARTIAL, FULL = "#f4f5f7", "#e9c46a", "#2a9d8f"

mpl.rcParams |= {
    "svg.hashsalt": "mmkernels",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.edgecolor": INK,
    "text.color": INK,
}


def _bare(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_aspect("equal")
    for side in axes.spines.values():
        side.set_visible(False)


def _box(axes: Axes, x: float, y: float, width: float, height: float, color: str, label: str = "") -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="white", linewidth=1))
    axes.text(x + width / 2, y + height / 2, label, ha="center", va="center", fontsize=8)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color=INK, linewidth=1))


def infonce() -> Figure:
    """One pass over the tiles of S = X Y^T gives the statistics of rows and columns."""
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    forward, backward = figure.subplots(1, 2)
    for axes, title in ((forward, "forward: one pass over S"), (backward, "backward: S again, tile by tile")):
        _bare(axes, title)
        axes.set_xlim(-1.6, 6.2)
        axes.set_ylim(6.2, -1.9)
        for i in range(5):
            _box(axes, -1.4, i, 0.9, 1, ROW, f"X{i}")
            _box(axes, i, -1.4, 1, 0.9, COLUMN, f"Y{i}")
            for j in range(5):
                _box(axes, j, i, 1, 1, QUIET)
        _box(axes, 3, 1, 1, 1, BOTH, "tile")
        _arrow(axes, (-0.5, 1.5), (3, 1.5))
        _arrow(axes, (3.5, -0.5), (3.5, 1))
    _arrow(forward, (4, 1.5), (5.25, 1.5))
    forward.text(5.3, 1.5, "lse of\nrow 1", va="center")
    _arrow(forward, (3.5, 2), (3.5, 5.3))
    forward.text(3.5, 5.75, "lse of column 3", ha="center", va="center")
    _arrow(backward, (4, 1.5), (5.25, 1.5))
    backward.text(5.3, 1.5, "G Y\ninto dX", va="center")
    _arrow(backward, (3.5, 2), (3.5, 5.3))
    backward.text(3.5, 5.75, "$G^T X$ into dY", ha="center", va="center")
    return figure


def tile_map() -> Figure:
    """Tiles that the kernels skip, mask or compute whole, for two packed documents with images."""
    parts = [(200, Modality.TEXT), (576, Modality.IMAGE), (300, Modality.TEXT), (120, Modality.TEXT)]
    parts += [(400, Modality.IMAGE), (452, Modality.TEXT)]
    cu_seqlens = torch.tensor([0, 1076, 2048], dtype=torch.int32)
    modality = torch.cat([torch.full((n,), int(kind), dtype=torch.uint8) for n, kind in parts])
    spans = torch.cat(
        [torch.full((n,), i if kind == Modality.IMAGE else -1, dtype=torch.int32) for i, (n, kind) in enumerate(parts)]
    )
    masks = {
        "multimodal: causal text, bidirectional images": AttentionMask.multimodal(cu_seqlens, modality, spans),
        "cross_only: other modalities of the sample": AttentionMask.cross_only(cu_seqlens, modality),
    }
    figure = Figure(figsize=(7.2, 3.9), layout="constrained")
    for axes, (title, mask) in zip(figure.subplots(1, 2), masks.items(), strict=True):
        states = tile_states(mask.rows(2048, 2048), 2048, 128, 64)
        _bare(axes, f"{title}\n{mask.density():.0%} of the pairs are visible")
        axes.set_aspect("auto")
        axes.imshow(states, cmap=ListedColormap([SKIP, PARTIAL, FULL]), vmin=0, vmax=2, aspect="auto")
        axes.vlines([j - 0.5 for j in range(1, 32)], -0.5, 15.5, color="white", linewidth=0.5)
        axes.hlines([i - 0.5 for i in range(1, 16)], -0.5, 31.5, color="white", linewidth=0.5)
    figure.supxlabel("tiles of 128 queries x 64 keys: grey is skipped, yellow masked, green computed whole", fontsize=9)
    return figure


def packing() -> Figure:
    """The same samples padded to the longest, and packed."""
    lengths = [410, 100, 250, 130, 130, 310, 180, 90, 220, 150, 52]
    colors = [mpl.colormaps["tab20"](i) for i in range(len(lengths))]
    plan = plan_packing(lengths, 512)
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    padded, packed = figure.subplots(1, 2)
    rows = {
        padded: [[i] for i in range(len(lengths))],
        packed: [items.tolist() for items in plan],
    }
    for axes, title, width in (
        (padded, f"padded: {sum(lengths) / (max(lengths) * len(lengths)):.0%} of the tokens are samples", max(lengths)),
        (packed, f"packed into 512: {plan.efficiency:.0%}", 512),
    ):
        _bare(axes, title)
        axes.set_aspect("auto")
        axes.set_xlim(0, 520)
        axes.set_ylim(len(lengths), -0.2)
        for y, items in enumerate(rows[axes]):
            axes.add_patch(Rectangle((0, y), width, 0.8, facecolor=QUIET))
            x = 0
            for i in items:
                axes.add_patch(Rectangle((x, y), lengths[i], 0.8, facecolor=colors[i], edgecolor="white"))
                axes.text(x + lengths[i] / 2, y + 0.4, str(lengths[i]), ha="center", va="center", fontsize=7)
                x += lengths[i]
    return figure


PICTURES = {"infonce": infonce, "tile-map": tile_map, "packing": packing}


def svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    IMAGES.mkdir(parents=True, exist_ok=True)
    stale = []
    for name, draw in PICTURES.items():
        path, text = IMAGES / f"{name}.svg", svg(draw())
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(path.name)
    if stale:
        print(f"out of date: {', '.join(stale)}", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
