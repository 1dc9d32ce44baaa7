"""The study: the options, every strategy's plan, the ranks' shares of the best plan, and the figures."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from numpy.typing import NDArray

from mmkernels import AttentionCost, EncoderCost, PackingPlan, RankSchedule, balance_ranks, plan_packing
from mmkernels.plan_cli.files import read_columns

__all__ = ["Options", "Report", "StrategyFigures", "in_turn", "study"]

STRATEGIES = ("best_fit", "subset_sum", "histogram", "next_fit")


@dataclass(frozen=True)
class Options:
    """How well lengths pack under each strategy, and how evenly ranks share the packs."""

    lengths: tyro.conf.Positional[Path]
    """LENGTHS.npy, .jsonl (numbers, or objects) or .parquet: tokens per item."""
    capacity: int
    """Maximum tokens per pack."""
    column: str = "length"
    """The token column, if the file has columns; a list counts as its length."""
    images: str | None = None
    """The column with the number of images per item."""
    max_images: int | None = None
    """Maximum images per pack (needs --images)."""
    max_samples: int | None = None
    """Maximum items per pack."""
    lookahead: int = 128
    """Items that subset_sum chooses from."""
    oversize: Literal["error", "drop", "own_pack"] = "error"
    """What to do with items that do not fit in any pack."""
    seed: int = 0
    """Shuffle the items first; 0 keeps the file's order."""
    ranks: int = 64
    """Ranks that share the packs."""
    accum: int = 1
    """Packs per rank and step."""
    width: int = 4096
    """Model width, for the cost of a pack: the narrower the model, the more attention dominates."""
    picture: Path | None = Path("packs.png")
    """Where to save the picture; None for no picture."""
    json: bool = False
    """Print the figures as JSON."""


@dataclass(frozen=True)
class StrategyFigures:
    """One strategy's plan."""

    strategy: str
    packs: int
    above_bound: int
    efficiency: float
    displacement: float
    seconds: float


@dataclass(frozen=True)
class Report:
    """The figures that the command shows."""

    items: int
    tokens: int
    capacity: int
    lower_bound: int
    dropped: int
    oversize_packs: int
    best: str
    padding_efficiency: float
    strategies: list[StrategyFigures]
    ranks: int
    steps: int
    dummies: int
    without_image: int
    imbalance: float
    imbalance_in_turn: float


def _padding_efficiency(lengths: NDArray[np.int64], batch: int = 32) -> float:
    """Efficiency without packing, as most trainers do: batches padded to their longest item."""
    if not lengths.sum():
        return 1.0
    padded = np.pad(lengths, (0, -len(lengths) % batch)).reshape(-1, batch)
    counts = np.minimum(len(lengths) - np.arange(len(padded)) * batch, batch)
    return float(lengths.sum() / (padded.max(1) * counts).sum())


def in_turn(plan: PackingPlan, ranks: int, accum: int, cost: AttentionCost) -> NDArray[np.float64]:
    """[steps, ranks] float64: each rank's cost when packs go to ranks round-robin; the last step may be short."""
    costs = cost.of_packs(plan)
    return np.pad(costs, (0, -len(costs) % (ranks * accum))).reshape(-1, accum, ranks).sum(1)


def _text(argument: str) -> str:
    """The argument as typed: under an ASCII locale Python keeps undecodable bytes as surrogates."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")


def study(options: Options) -> tuple[Report, PackingPlan, RankSchedule, AttentionCost]:
    """Plan with every strategy and distribute the packs of the best.

    Raises:
        ValueError: a wrong file or option.
    """
    columns = [_text(name) for name in (options.column, options.images) if name]
    found = read_columns(options.lengths, columns)
    lengths, images = found[columns[0]], found[columns[1]] if options.images else None
    caps: dict[str, Any] = {"images": images, "max_images": options.max_images, "max_samples": options.max_samples}
    figures, plans = [], []
    for strategy in STRATEGIES:
        window: dict[str, Any] = {"lookahead": options.lookahead} if strategy == "subset_sum" else {}
        common: dict[str, Any] = {"strategy": strategy, "oversize": options.oversize, "seed": options.seed}
        begin = time.perf_counter()
        try:
            plan = plan_packing(lengths, options.capacity, **common, **caps, **window)
        except ValueError as error:
            if strategy == "subset_sum" and "subset_sum" in str(error):
                print(f"subset_sum is left out: {error}", file=sys.stderr)
                continue
            raise
        seconds = time.perf_counter() - begin
        plans.append(plan)
        row = (plan.num_packs, plan.num_packs - plan.lower_bound, plan.efficiency, plan.displacement, seconds)
        figures.append(StrategyFigures(strategy, *row))
    best = min(plans, key=lambda plan: (plan.num_packs, plan.displacement))
    cost = AttentionCost(EncoderCost.transformer(options.width))
    schedule = balance_ranks(best, options.ranks, accum=options.accum, cost=cost)
    turns = in_turn(best, options.ranks, options.accum, cost)
    mean = float(turns.mean(1).sum()) if len(turns) else 0.0
    report = Report(
        items=len(lengths),
        tokens=int(lengths.sum()),
        capacity=options.capacity,
        lower_bound=best.lower_bound,
        dropped=len(best.dropped),
        oversize_packs=len(best.oversize_packs),
        best=best.strategy,
        padding_efficiency=_padding_efficiency(lengths),
        strategies=figures,
        ranks=options.ranks,
        steps=schedule.num_steps,
        dummies=int((schedule.packs < 0).sum()),
        without_image=int(schedule.no_image.sum()),
        imbalance=schedule.imbalance,
        imbalance_in_turn=float(turns.max(1).sum()) / mean if mean else 1.0,
    )
    return report, best, schedule, cost
