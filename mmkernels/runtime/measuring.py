"""Measured figures of the machine that runs this: products, copies, small ops, and the collectives of a group."""

from __future__ import annotations

import functools
import operator
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmkernels.runtime.collectives import Link, Network, all_gather, all_reduce
from mmkernels.runtime.gather import gather_into

__all__ = ["copy_rate", "fitted", "launch_seconds", "link_of", "matmul_rate", "worst_of"]

SIZES = (2**8, 2**12, 2**16, 2**20, 2**22)  # bytes of a rank's part


def matmul_rate(dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """Flop per second of torch's matmul, at the best of a few sizes: means, as a median hides that ranks take turns on
    too few cores."""
    best = 0.0
    for size in (256, 512, 1024) if device.type == "cpu" else (4096, 8192):
        if best and 10 * size**3 / best > seconds:
            break
        a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
        best = max(
            best, 2 * size**3 / statistics.median(_times(functools.partial(torch.matmul, a, b), device, seconds))
        )
    return best


def copy_rate(device: torch.device, seconds: float) -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.zeros(2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / statistics.fmean(_times(lambda: target.copy_(source), device, seconds))


def launch_seconds(device: torch.device, seconds: float, calls: int = 100) -> float:
    """Seconds of one small op."""
    x = torch.zeros(8, device=device)

    def many() -> None:
        for _ in range(calls):
            x.add_(1)

    return statistics.median(_times(many, device, seconds)) / calls


def link_of(group: Any, device: torch.device, rounds: int = 15) -> Link:
    """Latency and bandwidth that fit the times of all_gather and all_reduce over a group best, as if all of its ranks
    had the same link. Every rank calls this, and gets the same numbers.

    The times are medians of the slowest rank's; the fit minimises the sum of squared relative errors.
    """
    world = group.size()
    waits, sends, took = [], [], []
    for size in SIZES:
        mine, everybody = (torch.zeros(n, dtype=torch.uint8, device=device) for n in (size, size * world))
        floats = torch.zeros(size // 4, device=device)
        calls: list[tuple[Callable[[], Any], Callable[..., Any]]] = [
            (functools.partial(gather_into, everybody, mine, group), all_gather),
            (functools.partial(dist.all_reduce, floats, group=group), all_reduce),
        ]
        for call, model in calls:
            took.append(_slowest_median(call, group, device, rounds))
            waits.append(model(Network.flat(Link(1.0, float("inf"))), world, size).seconds)
            sends.append(model(Network.flat(Link(0.0, 1.0)), world, size).seconds)
    return fitted([w / t for w, t in zip(waits, took, strict=True)], [s / t for s, t in zip(sends, took, strict=True)])


def fitted(waits: list[float], sends: list[float]) -> Link:
    """The link for which `latency * waits + sends / bandwidth` is nearest to ones. By the normal equations in Python:
    LAPACK's last bits may differ between processes."""
    ww, ws, ss = (sum(map(operator.mul, *two)) for two in ((waits, waits), (waits, sends), (sends, sends)))
    w, s, area = sum(waits), sum(sends), ww * ss - ws * ws
    return Link(max((w * ss - s * ws) / area, 1e-9), 1 / max((s * ww - w * ws) / area, 1e-15))


def worst_of(numbers: list[float], largest: list[bool], group: Any, device: torch.device) -> list[float]:
    """The ranks' largest, or else smallest, of each number."""
    sign = torch.tensor([1.0 if large else -1.0 for large in largest], dtype=torch.float64, device=device)
    found = torch.tensor(numbers, dtype=torch.float64, device=device) * sign
    dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    return (found * sign).tolist()


def _slowest_median(call: Callable[[], Any], group: Any, device: torch.device, rounds: int) -> float:
    call()
    taken: list[float] = []
    for _ in range(rounds):
        dist.barrier(group=group)
        taken.append(_time(call, device))
    slowest: Tensor = torch.tensor(taken, dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
    return statistics.median(slowest.tolist())


def _times(call: Callable[[], Any], device: torch.device, seconds: float) -> list[float]:
    call()
    taken, end = [_time(call, device)], time.perf_counter() + seconds
    while time.perf_counter() < end:
        taken.append(_time(call, device))
    return taken


def _time(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
