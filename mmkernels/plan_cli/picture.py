"""The picture: packs filled with their items, the lengths, each strategy's waste, and the ranks' waiting time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from mmkernels import AttentionCost, PackingPlan, RankSchedule
from mmkernels.plan_cli.study import Report, in_turn

__all__ = ["draw"]

MOST_PACKS = 40
INK, GRID, WASTE, BEST, OTHER = "#334155", "#e2e8f0", "#ef4444", "#0f766e", "#94a3b8"
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "legend.frameon": False,
}


def draw(report: Report, plan: PackingPlan, schedule: RankSchedule, cost: AttentionCost, path: Path) -> None:
    """Write the picture; its format follows the path's suffix.

    Raises:
        OSError, ValueError: a missing folder, a suffix that is not a format.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(12, 6.6), dpi=150, layout="constrained")
        grid = figure.add_gridspec(3, 2, width_ratios=(1.7, 1))
        _packs(figure.add_subplot(grid[:, 0]), plan)
        _lengths(figure.add_subplot(grid[0, 1]), plan)
        _strategies(figure.add_subplot(grid[1, 1]), report)
        _ranks(figure.add_subplot(grid[2, 1]), report, plan, schedule, cost)
        figure.savefig(path)


def _packs(axes: Axes, plan: PackingPlan) -> None:
    """A row per pack, a block per item, coloured by its length; empty room in red."""
    shown = np.unique(np.linspace(0, plan.num_packs - 1, min(MOST_PACKS, plan.num_packs)).astype(int))
    longest = max(2, int(plan.lengths.max()))
    shortest = max(1, min(int(plan.lengths.min()), longest - 1))
    colour = LogNorm(shortest, longest) if longest >= 10 * shortest else Normalize(shortest, longest)
    shades = colormaps["viridis"]
    for row, pack in enumerate(shown):
        sizes = plan.lengths[plan[int(pack)]]
        left = np.concatenate([[0], np.cumsum(sizes)])
        axes.barh(
            row, sizes, left=left[:-1], height=0.86, color=shades(colour(np.maximum(sizes, 1))), ec="white", lw=0.4
        )
        if left[-1] < plan.capacity:
            axes.barh(row, plan.capacity - left[-1], left=left[-1], height=0.86, color=WASTE, lw=0)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0, max(plan.capacity, int(plan.pack_lengths[shown].max())))
    if len(plan.oversize_packs):
        axes.axvline(plan.capacity, color=INK, lw=1, ls="--")
    axes.set_yticks(range(0, len(shown), 5), [f"{shown[i]:,}" for i in range(0, len(shown), 5)])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.tick_params(length=0)
    axes.set_xlabel("tokens")
    axes.set_ylabel("pack")
    some = f"{len(shown)} of {plan.num_packs:,} packs" if len(shown) < plan.num_packs else f"{plan.num_packs} packs"
    axes.set_title(f"{some} by {plan.strategy}: {plan.efficiency:.2%} full (empty room in red)")
    bar = axes.figure.colorbar(
        ScalarMappable(colour, "viridis"), ax=axes, location="bottom", shrink=0.5, aspect=40, pad=0.015
    )
    bar.set_label("tokens of an item")
    bar.outline.set_visible(False)
    bar.ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _lengths(axes: Axes, plan: PackingPlan) -> None:
    """Histograms of items and of tokens over the length, each scaled to its maximum."""
    lengths = np.maximum(plan.lengths, 1)
    low, high = int(lengths.min()), int(lengths.max())
    wide = high >= 10 * low
    edges = np.unique(np.round(np.geomspace(low, high + 1, 60) if wide else np.linspace(low, high + 1, 60)))
    items, tokens = (np.histogram(lengths, edges, weights=weights)[0] for weights in (None, lengths))
    axes.stairs(items / items.max(), edges, fill=True, color=OTHER, label="items")
    axes.stairs(tokens / tokens.max(), edges, color=BEST, lw=1.5, label="tokens in them")
    if wide:
        axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_ylim(0, 1.35)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.legend(loc="upper right", fontsize=8, ncols=2)
    axes.set_title(f"lengths: mean {plan.lengths.mean():,.0f}, longest {high:,}")


def _strategies(axes: Axes, report: Report) -> None:
    """Waste on a log scale, because efficiencies near 1 all look alike."""
    rows = [(each.strategy, 1 - each.efficiency) for each in report.strategies]
    rows += [("least possible", 1 - _best_possible(report)), ("padding 32", 1 - report.padding_efficiency)]
    names, wasted = [name for name, _ in rows], np.array([waste for _, waste in rows])
    floor = min(1e-4, 0.5 * float(wasted[wasted > 0].min(initial=1e-4)))
    colours = [BEST if name == report.best else WASTE if name == "padding 32" else OTHER for name in names]
    axes.barh(names, np.maximum(wasted, floor) - floor, left=floor, color=colours, height=0.7)
    for row, waste in enumerate(wasted):
        axes.text(max(waste, floor) * 1.15, row, f"{waste:.3%}", va="center", fontsize=8, color=INK)
    axes.set_xscale("log")
    axes.set_xlim(floor, 12)
    axes.set_xticks([x for x in (1e-4, 1e-3, 1e-2, 1e-1, 1) if x >= floor])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.2%}" if value < 0.01 else f"{value:.0%}")
    axes.minorticks_off()
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)
    axes.set_title("room left empty")


def _best_possible(report: Report) -> float:
    """Efficiency of a plan with as many packs as the bound."""
    chosen = next(each for each in report.strategies if each.strategy == report.best)
    return min(1.0, chosen.efficiency * chosen.packs / report.lower_bound)


def _ranks(axes: Axes, report: Report, plan: PackingPlan, schedule: RankSchedule, cost: AttentionCost) -> None:
    """Cost of each step's slowest rank relative to the mean, full steps only."""
    accum = schedule.packs.shape[2]
    full = plan.num_packs // (report.ranks * accum)
    turns, balanced = in_turn(plan, report.ranks, accum, cost)[:full], schedule.costs.sum(2)[:full]
    if not len(turns):
        axes.text(0.5, 0.5, f"fewer packs than {report.ranks} ranks take in a step", ha="center", color=INK)
        axes.set_axis_off()
        return
    waits = [100 * (each.max(1) / each.mean(1) - 1) for each in (turns, balanced)]
    for wait, colour, name, value in zip(
        waits, (OTHER, BEST), ("in turn", "balance_ranks"), (report.imbalance_in_turn, report.imbalance), strict=True
    ):
        axes.plot(np.arange(1, len(wait) + 1), wait, color=colour, lw=1.2, label=f"{name}: {value:.3f} in all")
    axes.set_ylim(0, 1.3 * max(1e-9, float(max(wait.max() for wait in waits))))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}%")
    axes.tick_params(length=0)
    axes.grid(axis="y")
    axes.set_xlabel("step")
    axes.legend(loc="upper right", fontsize=8, ncols=2)
    axes.set_title(f"{report.ranks} ranks: slowest above the mean")
