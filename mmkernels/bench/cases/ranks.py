"""A contrastive loss over ranks of this machine, processes that talk over gloo, forward and backward: by all_gather, in
a ring, and as open_clip computes it in plain PyTorch: all_gather with a gradient, and logits of local rows by all keys.

A call's seconds are those of the slowest rank; processes share this machine's processors, so time over ranks grows as
their work does. Beside ours stands what `Machine.measured` predicts, from the links that it measures between them.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmkernels import Machine, infonce, siglip
from mmkernels.bench.case import Case, Params, Sample, Settings, Work
from mmkernels.bench.exchanges import call_of
from mmkernels.ops.contrastive.choice import choose, seconds

__all__ = ["cases"]

PLAIN = "plain PyTorch"
_TIMEOUT = 300.0  # seconds without a word from a rank
_TOLERANCE = 1e-4  # relative, of the loss and the gradients in float32 against those of one process in float64
_CHECKED = 48  # rows of each rank in this check

Step = Callable[[Tensor, Tensor, Tensor], Tensor]


def _plain_infonce(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Local rows by all keys, both ways, as open_clip with local_loss and gather_with_grad."""
    from torch.distributed.nn.functional import all_gather

    rank, every = dist.get_rank(), [torch.cat(all_gather(each)) for each in (x, y)]
    labels = torch.arange(len(x)) + rank * len(x)
    forth, back = scale * x @ every[1].T, scale * y @ every[0].T
    return (F.cross_entropy(forth, labels) + F.cross_entropy(back, labels)) / 2


def _plain_siglip(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    from torch.distributed.nn.functional import all_gather

    keys = torch.cat(all_gather(y))
    signs = torch.full((len(x), len(keys)), -1.0)
    signs.diagonal(dist.get_rank() * len(x)).fill_(1)
    return -F.logsigmoid(signs * (scale * x @ keys.T)).sum() / len(x)


def _ours(loss: str, exchange: str, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    over: dict[str, Any] = {"group": dist.group.WORLD, "exchange": exchange}
    value = siglip(x, y, scale, torch.tensor(0.0), **over) if loss == "siglip" else infonce(x, y, scale, **over)
    assert isinstance(value, Tensor)
    return value


def _steps(loss: str) -> dict[str, Step]:
    plain = {"infonce": _plain_infonce, "siglip": _plain_siglip}[loss]
    return {PLAIN: plain, **{f"mmkernels {how}": partial(_ours, loss, how) for how in ("all_gather", "ring")}}


def _features(p: Params, world: int, rank: int | None) -> list[Tensor]:
    """Of one rank, or of all."""
    generator = torch.Generator().manual_seed(0)
    every = [F.normalize(torch.randn(p["rows"] * world, p["E"], generator=generator), dim=1) for _ in "xy"]
    own = slice(None) if rank is None else slice(rank * p["rows"], (rank + 1) * p["rows"])
    return [each[own].to(getattr(torch, p["dtype"])).requires_grad_() for each in every]


def _called(step: Step, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients."""
    value = step(x, y, torch.tensor(10.0))
    dx, dy = torch.autograd.grad(value, [x, y])
    return value.detach(), dx, dy


def _fault(p: Params, world: int, rank: int, step: Step) -> str:
    """What is wrong with a contender's loss and its gradients on this rank, or nothing.

    Gradients are W times those of the mean over all ranks, as trainers that average them over ranks expect.
    """
    p = {**p, "rows": _CHECKED}
    whole = [each.detach().double().requires_grad_() for each in _features(p, world, None)]
    scale = torch.tensor(10.0, dtype=torch.float64)
    x, y = whole
    single = siglip(x, y, scale, torch.zeros_like(scale)) if p["loss"] == "siglip" else infonce(x, y, scale)
    assert isinstance(single, Tensor)
    expected = torch.autograd.grad(single, whole)
    found = _called(step, *_features(p, world, rank))
    total = found[0].double()
    dist.all_reduce(total)  # ours is the mean over all ranks already, plain PyTorch's that of a rank's rows
    total /= world
    faults = (
        [f"loss: {total.item():.6g}, expected {single.item():.6g}"]
        if not abs(total - single) <= _TOLERANCE * single
        else []
    )
    for name, mine, of in zip(("queries", "keys"), found[1:], expected, strict=True):
        own = of[rank * p["rows"] : (rank + 1) * p["rows"]]
        distance = ((mine.double() / world - own).norm() / own.norm()).item()
        if not distance <= _TOLERANCE:
            faults.append(f"gradient of {name}: {distance:.1e} from one process's")
    return "; ".join(faults)


def _slowest(step: Step, inputs: Sequence[Tensor]) -> float:
    """Seconds of the slowest rank."""
    dist.barrier()
    begin = time.perf_counter()
    _called(step, *inputs)
    took = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return took.item()


def _machine(world: int, rank: int) -> Machine:
    """Links of all ranks, and the rates of one that has a processor to itself, which they share if they have fewer."""
    own = [Machine.measured() if rank == 0 else None]
    dist.broadcast_object_list(own, src=0)
    assert own[0] is not None
    share = min(1.0, len(os.sched_getaffinity(0)) / world)
    links = Machine.measured(group=dist.group.WORLD, dtypes=(torch.float32,), seconds=0.01)
    rates = {name: share * rate for name, rate in own[0].flops.items()}
    launch, copies = own[0].launch / share, share * own[0].memory_bandwidth
    return replace(links, flops=rates, launch=launch, memory_bandwidth=copies)


def _predicted(p: Params, world: int, machine: Machine, exchange: str) -> float:
    call = call_of(p["rows"], p["E"], world, getattr(torch, p["dtype"]), sigmoid=p["loss"] == "siglip")
    return call.rest(machine.network).seconds + sum(seconds(call, each, exchange, machine) for each in call.rounds())


def _measured(p: Params, names: Sequence[str], settings: Settings, world: int, rank: int) -> dict[str, Any]:
    """On one rank: contender -> its sample, or what is wrong."""
    machine = _machine(world, rank)
    steps = {name: step for name, step in _steps(p["loss"]).items() if name in names}
    found: dict[str, Any] = {name: _fault(p, world, rank, step) for name, step in steps.items()}
    wrong = [found] * world
    dist.all_gather_object(wrong, found)
    found = {name: next((each[name] for each in wrong if each[name]), "") for name in steps}
    ready = {name: step for name, step in steps.items() if not found[name]}
    inputs = _features(p, world, rank)
    first = {name: max(_slowest(step, inputs), _slowest(step, inputs)) for name, step in ready.items()}
    rounds = {name: max(settings.least, min(60, int(settings.seconds / took))) for name, took in first.items()}
    samples: dict[str, list[float]] = {name: [] for name in ready}
    for round_ in range(max(rounds.values(), default=0)):
        for name, step in ready.items():
            if round_ < rounds[name]:
                samples[name].append(_slowest(step, inputs))
    call = call_of(p["rows"], p["E"], world, getattr(torch, p["dtype"]), sigmoid=p["loss"] == "siglip")
    chosen = choose(call, machine)[0]
    for name in ready:
        exchange = name.partition(" ")[2]
        figures, predicted = {}, None
        if name != PLAIN:
            figures = {"MB received": call.cost(machine.network, rank, exchange).received / 1e6}
            figures["chosen"] = float(exchange == chosen)
            predicted = _predicted(p, world, machine, exchange)
        found[name] = Sample(samples[name], figures, predicted)
    return found


def _work(rank: int, folder: str, p: Params, names: Sequence[str], settings: Settings, answers: Any) -> None:
    """A rank's process."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)  # open_clip's all_gather will go
    world = p["W"]
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=world)
        found = _measured(p, names, settings, world, rank)
        dist.barrier()
        answers.put((rank, found if rank == 0 else None))
    except Exception:
        answers.put((rank, traceback.format_exc()))
    answers.close()
    answers.join_thread()
    os._exit(0)  # no teardown of the group: it may wait for ranks that have left


def sample(p: Params, names: Sequence[str], settings: Settings) -> Mapping[str, Sample | str]:
    """Start the ranks, and return what they measured.

    Raises:
        RuntimeError: a rank failed, or none answered in time.
    """
    context = multiprocessing.get_context("forkserver")
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=_work, args=(r, folder, p, names, settings, answers)) for r in range(p["W"])]
        for process in ranks:
            process.start()
        try:
            for _ in ranks:
                rank, found = answers.get(timeout=_TIMEOUT)
                if isinstance(found, str):
                    raise RuntimeError(f"rank {rank} failed:\n{found}")
                if rank == 0:
                    result: Mapping[str, Sample | str] = found
        finally:
            for process in ranks:
                process.join(5)
                process.kill()
    return result


def _work_of(p: Params) -> Work:
    """Of all ranks together."""
    n = p["rows"] * p["W"]
    return Work(flops=2 * 3 * n * n * p["E"])


def cases(settings: Settings) -> list[Case]:
    if settings.device != "cpu":
        return []

    def points(loss: str, worlds: Sequence[int], rows: int) -> list[Params]:
        return [{"W": world, "loss": loss, "rows": rows, "E": 512, "dtype": "float32"} for world in worlds]

    found = []
    for loss in ("infonce", "siglip"):
        case = Case(
            name=f"{loss} over ranks",
            quick=points(loss, [2], 256) if loss == "infonce" else [],
            full=points(loss, [1, 2, 4, 8], 512),
            setup=lambda _point, _device: {},
            ours=lambda _inputs, _backend: (),
            others={name: lambda _inputs: () for name in _steps(loss)},
            baseline=(PLAIN,),
            work=_work_of,
            curve="W",
            sample=sample,
            memory=False,
        )
        found.append(case)
    return found
