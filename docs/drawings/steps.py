"""Draw the docs' pictures of steps: gradient caching, and what each rank sends.

    python docs/drawings/steps.py            # writes the pictures
    python docs/drawings/steps.py --check    # draws in memory and compares

Bytes are those of the package's traffic model, which tests compare with what collectives deliver. Needs
`mmkernels[plot]`.
"""

from __future__ import annotations

import sys

import torch
from drawing import BOTH, COLUMN, INK, QUIET, ROW, arrow, bare, box, main
from matplotlib.figure import Figure

from mmkernels.ops.contrastive.traffic import Call
from mmkernels.runtime.collectives import Link, Network

CHUNKS = 4


def gradcache() -> Figure:
    """Three passes, and what is in memory during each."""
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    passes, memory = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    bare(passes, "")
    titles = {
        0: "1. embed, without a graph",
        CHUNKS + 0.1: "2. loss of all N",
        6.2: "3. each chunk again, with its gradient",
    }
    for x, title in titles.items():
        passes.text(x, -0.35, title, fontsize=9)
    bare(memory, "activations in memory")
    for axes in (passes, memory):
        axes.set_aspect("auto")
        axes.set_xlim(-0.2, 14.2)
    passes.set_ylim(2.2, -0.6)
    memory.set_ylim(0, 1.3)
    for i in range(CHUNKS):
        box(passes, i, 0, 0.9, 0.8, ROW, f"chunk {i}")
        box(passes, i, 1.2, 0.9, 0.8, QUIET, f"$e_{i}$")
        arrow(passes, (i + 0.45, 0.8), (i + 0.45, 1.2))
        at = 6.2 + 2 * i
        box(passes, at, 0, 0.9, 0.8, ROW, f"chunk {i}")
        box(passes, at + 0.95, 0, 0.9, 0.8, COLUMN, "back")
        box(passes, at, 1.2, 1.85, 0.8, BOTH, f"$\\partial L/\\partial e_{i}$")
        arrow(passes, (at + 1.4, 1.2), (at + 1.4, 0.8))
        memory.plot([at, at + 0.9, at + 1.85], [0.05, 1, 0.05], color=ROW)
    box(passes, CHUNKS + 0.1, 1.2, 1.9, 0.8, BOTH, "loss, $\\partial L/\\partial e$")
    memory.plot([0, CHUNKS, 6.2], [0.02, 0.05, 0.05], color=ROW)
    memory.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    memory.text(0, 1.06, "one chunk's", fontsize=8)
    memory.axhline(0.0, color=QUIET)
    return figure


def exchange() -> Figure:
    """What a rank of four receives of keys, statistics and gradients, by all_gather and in a ring."""
    rows, width, world = 1024, 768, 4
    call = Call([rows] * world, [rows] * world, [0] * world, width, torch.bfloat16, scalars=(4,))
    network = Network.flat(Link(1e-5, 1e10))
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    gathered, ring = figure.subplots(1, 2)
    for axes, name in ((gathered, "all_gather"), (ring, "ring")):
        received = call.cost(network, 0, name).received / 1e6
        bare(axes, f"{name}: rank 0 receives {received:.1f} MB\n(1024 pairs a rank, E = 768, bf16)")
        axes.set_aspect("auto")
        axes.set_xlim(-0.2, 4.4)
        axes.set_ylim(5.4, -0.7)
        for rank in range(world):
            box(axes, 0, rank, 0.9, 0.8, ROW, f"rank {rank}")
        for step in range(world):
            axes.text(1.45 + 0.75 * step, -0.25, "own" if step == 0 else f"step {step}", ha="center", fontsize=8)
            for rank in range(world):
                block = (rank - step) % world
                color = COLUMN if step == 0 else QUIET
                if name == "ring" or step == 0:
                    box(axes, 1.1 + 0.75 * step, rank, 0.7, 0.8, color, f"$Y_{block}$")
        if name == "all_gather":
            for rank in range(world):
                others = ", ".join(f"$Y_{block}$" for block in range(world) if block != rank)
                box(axes, 1.85, rank, 2.2, 0.8, QUIET, others)
    gathered.text(0, 4.7, "all keys at once: O(N E) memory; gradients return\nin one all-to-all", fontsize=8)
    ring.text(
        0, 4.7, "one block at a time: O(n E) memory; keys go round twice,\nand their gradients in float32", fontsize=8
    )
    return figure


PICTURES = {"gradcache": gradcache, "exchange": exchange}

if __name__ == "__main__":
    sys.exit(main(PICTURES, __doc__))
