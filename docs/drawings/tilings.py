"""Draw the docs' pictures, `docs/images/*.svg`: how the kernels and the planner split their work.

    python docs/drawings/tilings.py            # writes the pictures
    python docs/drawings/tilings.py --check    # draws in memory and compares

The contents come from the package where Python determines them (tile states of a mask, packs of a plan), and from the
families' READMEs where only a kernel does (the order of InfoNCE's tiles). Needs `mmkernels[plot]`.
"""

from __future__ import annotations

import sys

import matplotlib as mpl
import torch
from drawing import BOTH, COLUMN, FULL, PARTIAL, QUIET, ROW, SKIP, arrow, bare, box, main
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mmkernels import AttentionMask, Modality, plan_packing
from mmkernels.ops.attention.tiles import tile_states
from mmkernels.testing.lengths import lengths_like


def infonce() -> Figure:
    """One pass over the tiles of S = X Y^T gives the statistics of rows and columns."""
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    forward, backward = figure.subplots(1, 2)
    for axes, title in ((forward, "forward: one pass over S"), (backward, "backward: S again, tile by tile")):
        bare(axes, title)
        axes.set_xlim(-1.6, 6.2)
        axes.set_ylim(6.2, -1.9)
        for i in range(5):
            box(axes, -1.4, i, 0.9, 1, ROW, f"X{i}")
            box(axes, i, -1.4, 1, 0.9, COLUMN, f"Y{i}")
            for j in range(5):
                box(axes, j, i, 1, 1, QUIET)
        box(axes, 3, 1, 1, 1, BOTH, "tile")
        arrow(axes, (-0.5, 1.5), (3, 1.5))
        arrow(axes, (3.5, -0.5), (3.5, 1))
    arrow(forward, (4, 1.5), (5.25, 1.5))
    forward.text(5.3, 1.5, "lse of\nrow 1", va="center")
    arrow(forward, (3.5, 2), (3.5, 5.3))
    forward.text(3.5, 5.75, "lse of column 3", ha="center", va="center")
    arrow(backward, (4, 1.5), (5.25, 1.5))
    backward.text(5.3, 1.5, "G Y\ninto dX", va="center")
    arrow(backward, (3.5, 2), (3.5, 5.3))
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
        bare(axes, f"{title}\n{mask.density():.0%} of the pairs are visible")
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
        bare(axes, title)
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


def strategies() -> Figure:
    """The same lengths packed by best fit and by subset sums: what is left empty."""
    lengths, capacity = lengths_like("caption@4096", 100)
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    for axes, strategy in zip(figure.subplots(1, 2, sharey=True), ("best_fit", "subset_sum"), strict=True):
        plan = plan_packing(lengths, capacity, strategy=strategy)
        bare(axes, f"{strategy}: {plan.num_packs} packs, {plan.efficiency:.1%} full")
        axes.set_aspect("auto")
        axes.set_xlim(0, capacity)
        axes.set_ylim(len(plan_packing(lengths, capacity, strategy="best_fit")), -0.2)
        for y, items in enumerate(plan):
            axes.add_patch(Rectangle((0, y), capacity, 0.8, facecolor=PARTIAL))
            x = 0
            for i in sorted(items.tolist(), key=lambda i: -lengths[i]):
                axes.add_patch(Rectangle((x, y), int(lengths[i]), 0.8, facecolor=ROW, edgecolor="white", linewidth=0.4))
                x += int(lengths[i])
    figure.supxlabel(f"100 captions in packs of {capacity:,} tokens: yellow stays empty", fontsize=9)
    return figure


PICTURES = {"infonce": infonce, "tile-map": tile_map, "packing": packing, "strategies": strategies}


if __name__ == "__main__":
    sys.exit(main(PICTURES, __doc__))
