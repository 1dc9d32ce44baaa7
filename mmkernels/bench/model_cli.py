"""`mmkernels bench model`: how long a contrastive loss over many ranks takes, how many bytes, and which exchange."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from tabulate import tabulate

from mmkernels import Link, Machine
from mmkernels.bench.exchanges import Exchange, call_of, exchanges
from mmkernels.ops.contrastive.choice import MEMORY_SHARE

__all__ = ["main", "predictions"]

_Dtype = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class Options:
    """How long a contrastive loss (forward and backward) over many ranks takes, how many bytes it sends, and by which
    exchange, before you book a cluster.

    Bytes follow from the options. Seconds are predicted from the machine's figures: flop / rate, bytes / bandwidth,
    messages * latency. `mmkernels scale` plans whole training steps."""

    n: int = 65536
    """Pairs of all ranks."""
    e: int = 768
    """Width of the features."""
    world: int = 64
    """Ranks."""
    link: float | None = None
    """Bytes per second into a rank from another node; by default the machine's."""
    latency: float | None = None
    """Seconds of a message between nodes; by default the machine's."""
    ranks_per_node: int | None = None
    """By default the machine's."""
    machine: str = "H100"
    """A100-80GB, H100, H200 or CPU by data sheet, or a file that Machine.save wrote."""
    dtype: _Dtype = "bfloat16"
    """Of features and products."""
    loss: Literal["infonce", "siglip"] = "infonce"
    """The loss."""
    json: bool = False
    """Print the figures as JSON."""


def _machine(options: Options) -> Machine:
    path = Path(options.machine)
    machine = Machine.load(path) if path.suffix or path.exists() else Machine.named(options.machine)
    bandwidth, latency = options.link, options.latency
    between = Link(
        machine.between.latency if latency is None else latency,
        machine.between.bandwidth if bandwidth is None else bandwidth,
    )
    per_node = machine.ranks_per_node if options.ranks_per_node is None else options.ranks_per_node
    return replace(machine, between=between, ranks_per_node=per_node)


def _wrong(options: Options) -> str:
    """What is wrong with the options, or nothing."""
    for name in ("n", "e", "world", "ranks_per_node"):
        value = getattr(options, name)
        if value is not None and value < 1:
            return f"--{name.replace('_', '-')}: expected at least 1, got {value}"
    for name in ("link", "latency"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            return f"--{name}: expected a number > 0, got {value}"
    if options.world > options.n:
        return f"--world: expected at most --n, {options.n}, so that every rank has a pair, got {options.world}"
    return ""


def _predicted(options: Options, world: int, machine: Machine) -> list[Exchange]:
    rows = -(-options.n // world)
    dtype = getattr(torch, options.dtype)
    return exchanges(call_of(rows, options.e, world, dtype, sigmoid=options.loss == "siglip"), machine)


def _best(found: Sequence[Exchange], machine: Machine) -> Exchange:
    """The fastest of those that the package has and that fit."""
    room = MEMORY_SHARE * machine.memory
    real = [each for each in found if not each.name.startswith("grid")]
    fitting = [each for each in real if each.held <= room] or [min(real, key=lambda each: each.held)]
    return min(fitting, key=lambda each: each.seconds)


def _advice(options: Options, found: Sequence[Exchange], machine: Machine) -> str:
    best, gathered = _best(found, machine), found[0]
    text = f"Take {best.name}: {best.seconds * 1e3:,.1f} ms, of which {best.lost:.0%} are not computation"
    if best is not gathered and gathered.held > MEMORY_SHARE * machine.memory:
        text += f"; all_gather would hold {gathered.held / 1e9:,.1f} GB, more than {MEMORY_SHARE:.0%} of the memory"
    grid = next((each for each in found if each.name.startswith("grid")), None)
    if grid is not None and grid.seconds < best.seconds:
        gain = best.seconds / grid.seconds
        text += f". A grid, which mmkernels does not have, would take {grid.seconds * 1e3:,.1f} ms ({gain:.1f}x)"
    return text + "."


HEADS = ("exchange", "MB received", "messages", "exchange ms", "products ms", "GB held", "total ms", "not computing")


def _row(each: Exchange, best: Exchange) -> tuple[str, ...]:
    sizes = (f"{each.received / 1e6:,.1f}", f"{each.messages:,}", f"{each.exchange * 1e3:,.1f}")
    times = (f"{each.products * 1e3:,.1f}", f"{each.held / 1e9:,.2f}", f"{each.seconds * 1e3:,.1f}")
    return f"{each.name}{' *' if each is best else ''}", *sizes, *times, f"{each.lost:.0%}"


def _worlds(options: Options) -> list[int]:
    """A quarter to four times the ranks."""
    return [world for world in (options.world // 4, options.world // 2, options.world * 2, options.world * 4) if world]


def _render(options: Options, machine: Machine) -> Iterator[str]:
    found = _predicted(options, options.world, machine)
    best = _best(found, machine)
    rows = -(-options.n // options.world)
    yield f"{machine.name}: {machine.source}"
    yield (
        f"{options.loss} of {options.n:,} pairs, E = {options.e}, {options.dtype}, on {options.world:,} ranks "
        f"of {rows:,}: forward and backward, per rank"
    )
    yield ""
    align = ("left", *["right"] * (len(HEADS) - 1))
    yield str(tabulate([_row(each, best) for each in found], HEADS, disable_numparse=True, colalign=align))
    yield ""
    yield _advice(options, found, machine)
    others = []
    for world in _worlds(options):
        if world <= options.n:
            predicted = _predicted(options, world, machine)
            chosen = _best(predicted, machine)
            times = [f"{each.seconds * 1e3:,.1f}" for each in predicted] + [""] * (3 - len(predicted))
            others.append((f"{world:,}", chosen.name, *times, f"{chosen.lost:.0%}"))
    heads = ("ranks", "best", "all_gather ms", "ring ms", "grid ms", "not computing")
    yield ""
    yield "The same pairs on other numbers of ranks:"
    align = ("right", "left", *["right"] * 4)
    yield str(tabulate(others, heads, disable_numparse=True, colalign=align))


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mmkernels bench model`; returns the exit status."""
    options = tyro.cli(Options, prog="mmkernels bench model", args=None if argv is None else list(argv))
    wrong = _wrong(options)
    try:
        machine = _machine(options) if not wrong else None
    except (ValueError, OSError) as error:
        wrong = f"--machine: {error}"
    if wrong or machine is None:
        print(f"mmkernels bench model: {wrong}", file=sys.stderr)
        return 2
    if options.json:
        worlds = [options.world, *(world for world in _worlds(options) if world <= options.n)]
        found = {world: [asdict(each) for each in _predicted(options, world, machine)] for world in worlds}
        print(json.dumps({"machine": asdict(machine), "options": asdict(options), "exchanges": found}, indent=1))
        return 0
    for line in _render(options, machine):
        print(line)
    return 0


def predictions(rows: int = 1024, width: int = 1024, machine: str = "H100") -> list[dict[str, Any]]:
    """For the suite's page: seconds over 1 to 4,096 ranks with the same rows each, by each exchange."""
    every: dict[str, list[tuple[int, float]]] = {}
    for world in (2**k for k in range(13)):
        for each in exchanges(call_of(rows, width, world, torch.bfloat16), Machine.named(machine)):
            every.setdefault(each.name.partition(" ")[0], []).append((world, each.seconds))
    of = {"rows per rank": rows, "E": width, "dtype": "bfloat16"}
    about = {"case": "infonce over ranks", "x": "W", "of": of, "machine": f"{machine}, by data sheet"}
    return [{**about, "series": name, "points": points} for name, points in every.items()]
