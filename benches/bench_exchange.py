"""The cost model against the clock: a contrastive loss over 2 and 4 ranks of this machine by gloo, forward and
backward, by all_gather and in a ring, beside what `Machine.measured` predicts for it.

    python benches/bench_exchange.py [--quick]

Times are medians of the slowest rank, and "busy" its processor time: where that is far less, ranks waited for each
other, or for other programs. "error %" is (predicted - measured) / measured; "wire" is what the loopback device carried
over what all ranks should receive: a little more, for headers and other programs.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tyro
from case import Row
from measure import Timing
from report import machine, print_table, save
from torch import Tensor

from mmkernels import Machine, infonce, siglip
from mmkernels.ops.contrastive.choice import choose, seconds
from mmkernels.ops.contrastive.traffic import Call
from mmkernels.runtime.collectives import all_gather, all_reduce, all_to_all, ring_pass
from mmkernels.runtime.gather import gather_into

LOSSES = {"infonce": infonce, "siglip": lambda *features, **over: siglip(*features, 0.0, **over)}


@dataclass(frozen=True)
class Options:
    """The cost model against the clock."""

    quick: bool = False
    """Small sizes."""
    worlds: tuple[int, ...] = (2, 4)
    """Ranks."""
    repeats: int = 11
    """Timed calls of each."""
    save: bool = True
    """Write the figures to benches/results/."""


def points(quick: bool) -> list[dict[str, Any]]:
    rows = (64,) if quick else (64, 256, 1024)
    points = [{"loss": loss, "rows": n, "E": 512, "dtype": "float32"} for loss in LOSSES for n in rows]
    return points if quick else [*points, {"loss": "infonce", "rows": 256, "E": 512, "dtype": "bfloat16"}]


def slowest(call: Callable[[], Any], repeats: int) -> tuple[Timing, float]:
    """Seconds of the slowest rank, and its median processor time."""
    call()
    taken, busy = [], []
    for _ in range(repeats):
        dist.barrier()
        begin, worked = time.perf_counter(), time.process_time()
        call()
        taken.append(time.perf_counter() - begin)
        busy.append(time.process_time() - worked)
    of_all = torch.tensor([taken, busy], dtype=torch.float64)
    dist.all_reduce(of_all, dist.ReduceOp.MAX)
    low, median, high = statistics.quantiles(of_all[0].tolist(), n=4)
    return Timing(median, low, high, repeats), statistics.median(of_all[1].tolist())


def loopback() -> int:
    """Bytes that the loopback device has received."""
    lines = Path("/proc/net/dev").read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) for line in lines if line.strip().startswith("lo:")), 0)


def on_the_wire(call: Callable[[], Any], calls: int = 3) -> float:
    """Bytes of one call, of all ranks."""
    dist.barrier()
    time.sleep(0.2)
    before = loopback()
    dist.barrier()
    for _ in range(calls):
        call()
    dist.barrier()
    time.sleep(0.2)
    return (loopback() - before) / calls


def collectives(world: int, model: Machine, repeats: int) -> list[Row]:
    """Each collective alone."""
    found, network = [], model.network
    for size in (2**10, 2**16, 2**20):
        mine, floats = torch.zeros(size, dtype=torch.uint8), torch.zeros(size // 4)
        everybody, returned = torch.zeros(size * world, dtype=torch.uint8), torch.zeros(size * world, dtype=torch.uint8)

        def passed(mine: Tensor = mine) -> None:
            peers = [(dist.get_rank() + d) % world for d in (1, -1)]
            sent = dist.P2POp(dist.isend, mine, peers[0]), dist.P2POp(dist.irecv, torch.empty_like(mine), peers[1])
            for work in dist.batch_isend_irecv(list(sent)):
                work.wait()

        splits = [size] * world
        runs = {
            "all_gather": (lambda a=everybody, b=mine: gather_into(a, b, None), all_gather),
            "all_reduce": (lambda x=floats: dist.all_reduce(x), all_reduce),
            "all_to_all": (lambda a=everybody, b=returned, s=splits: dist.all_to_all_single(a, b, s, s), all_to_all),
            "ring pass": (passed, ring_pass),
        }
        for name, (call, cost) in runs.items():
            predicted, (timing, busy) = cost(network, world, size), slowest(call, repeats)
            row = Row("collective", {"W": world, "bytes": size}, name, timing, figures={"busy ms": busy * 1e3})
            found.append(judged(row, predicted.seconds, predicted.received * world, on_the_wire(call)))
    return found


def judged(row: Row, predicted: float, received: int, wire: float) -> Row:
    assert row.timing is not None
    row.figures["predicted ms"] = predicted * 1e3
    row.figures["error %"] = 100 * (predicted / row.timing.median - 1)
    row.figures |= {"MB received": received / 1e6, "wire": wire / max(received, 1)}
    return row


def step(loss: str, exchange: str, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """A forward and a backward."""
    value = LOSSES[loss](x, y, scale, group=dist.group.WORLD, exchange=exchange)
    value.backward()
    return value.detach()


def losses(rank: int, world: int, model: Machine, repeats: int, quick: bool) -> list[Row]:
    found = []
    for point in points(quick):
        n, width, dtype, sigmoid = point["rows"], point["E"], getattr(torch, point["dtype"]), point["loss"] == "siglip"
        generator = torch.Generator().manual_seed(0)
        x, y = (torch.randn(n * world, width, generator=generator).div(width**0.5).to(dtype) for _ in range(2))
        mine = [t[rank * n : (rank + 1) * n].clone().requires_grad_() for t in (x, y)]
        scale = torch.tensor(10.0, requires_grad=True)
        whole = LOSSES[point["loss"]](x, y, scale.detach())
        call_ = Call([n] * world, [n] * world, [0] * world, width, dtype, sigmoid=sigmoid)
        took: dict[str, Row] = {}
        for exchange in ("all_gather", "ring"):
            call = partial(step, point["loss"], exchange, *mine, scale)
            torch.testing.assert_close(call(), whole, rtol=1e-5, atol=1e-5)
            received = sum(call_.cost(model.network, each, exchange).received for each in range(world))
            predicted = call_.rest(model.network).seconds
            predicted += sum(seconds(call_, each, exchange, model) for each in call_.rounds())
            timing, busy = slowest(call, repeats)
            row = Row("loss", {"W": world, **point}, exchange, timing, figures={"busy ms": busy * 1e3})
            took[exchange] = judged(row, predicted, received, on_the_wire(call))
        best = min(took, key=lambda name: took[name].timing.median)
        chosen = choose(call_, model)[0]
        loses = took[chosen].timing.median / took[best].timing.median - 1
        took[chosen].note = "chosen" + ("" if chosen == best else f", {loses:.0%} slower")
        found += took.values()
    return found


def work(rank: int, world: int, folder: str, options: Options, answers: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{world}", rank=rank, world_size=world)
    model = Machine.measured(group=dist.group.WORLD)
    rows = collectives(world, model, options.repeats) + losses(rank, world, model, options.repeats, options.quick)
    if rank == 0:
        answers.put((dataclasses.asdict(model), rows))
    dist.barrier()
    os._exit(0)  # no teardown of the group: it may wait for ranks that have left


def main() -> None:
    options = tyro.cli(Options, prog="bench_exchange.py")
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"the machine is not idle: a load of {load:.1f}; times are then those of its other programs too")
    context, rows, models = mp.get_context("spawn"), [], {}
    for world in options.worlds:
        answers = context.Queue()
        with tempfile.TemporaryDirectory() as folder:
            ranks = [context.Process(target=work, args=(r, world, folder, options, answers)) for r in range(world)]
            for process in ranks:
                process.start()
            models[world], found = answers.get(timeout=1200)
            for process in ranks:
                process.join(30)
        rows += found
        link, rates = models[world]["inside"], models[world]["flops"]
        print(
            f"\nW={world}: {rates['float32'] / 1e9:.0f} GFLOP/s in float32, {link['latency'] * 1e3:.2f} ms a message, "
            f"{link['bandwidth'] / 1e6:.0f} MB/s"
        )
        for _, of_point in itertools.groupby(found, lambda row: row.title):
            print_table(list(of_point))
    errors = [abs(row.figures["error %"]) for row in rows if row.case == "loss"]
    print(f"\nlosses: median error {statistics.median(errors):.0f}%, largest {max(errors):.0f}%")
    if options.save:
        about = machine(torch.device("cpu")) | {"ceilings": models, "quick": options.quick, "bench": "exchange"}
        about["load average"] = load
        print(save(about, rows))


if __name__ == "__main__":
    main()
