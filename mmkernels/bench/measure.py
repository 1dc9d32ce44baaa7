"""Seconds of calls, and the machine's ceilings."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from mmkernels.runtime import native

__all__ = ["ceilings", "copy_bandwidth", "in_turn", "matmul_peak"]

Run = Callable[[], Any]

MOST = 60  # rounds of a contender: more only make results files longer

# Written between calls on a GPU, so that no contender finds its input in the L2 cache (50 MB on Hopper).
_FLUSH_BYTES = 256 * 2**20


class _Clock:
    """Time one call: by events on a GPU, by wall clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            self.flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
            self.start, self.end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def __call__(self, run: Run) -> float:
        if not self.cuda:
            begin = time.perf_counter()
            run()
            return time.perf_counter() - begin
        self.flush.zero_()
        self.start.record()
        run()
        self.end.record()
        torch.cuda.synchronize()
        return self.start.elapsed_time(self.end) / 1e3


_WARM_UPS = 2  # calls of `in_turn` before those that count: one that fills caches, and a first look


def in_turn(
    runs: Mapping[str, Run],
    device: torch.device,
    *,
    seconds: float,
    least: int = 5,
    disable_gc: bool = False,
    took: Mapping[str, float] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each call of each contender, which take turns, so that a drift of the machine affects all equally.

    Round i of one contender is followed by round i of the next: ratios of a round are of the same moment.

    Args:
        runs: name -> call.
        device: where they run.
        seconds: time to spend on each, after the warm-up.
        least: minimum rounds (3 if a single call takes longer than `seconds`).
        disable_gc: without Python's garbage collector.
        took: name -> seconds of a call before; those that took `seconds` or more are not warmed up again.
    """
    clock = _Clock(device)
    counts: dict[str, int] = {}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    collects = gc.isenabled()
    if disable_gc:
        gc.disable()
    try:
        for name, run in runs.items():
            first = (took or {}).get(name, 0.0)
            if first < seconds:
                run()
                first = clock(run)
            counts[name] = max(least if first < seconds else min(least, 3), min(MOST, int(seconds / max(first, 1e-6))))
        for round_ in range(max(counts.values(), default=0)):
            for name, run in runs.items():
                if round_ < counts[name]:
                    samples[name].append(clock(run))
    finally:
        if collects:
            gc.enable()
    return samples


# Ceilings


def _fastest(run: Run, device: torch.device, seconds: float) -> float:
    """The first quartile: the machine undisturbed, but not its luckiest moment."""
    taken = sorted(in_turn({"": run}, device, seconds=seconds)[""])
    return taken[len(taken) // 4]


def matmul_peak(dtype: torch.dtype, device: torch.device, seconds: float = 1.0) -> float:
    """FLOP/s of torch's matmul, the best of a few sizes.

    Skips sizes that would take longer than `seconds`: without bfloat16 instructions a bfloat16 matmul is 25 times
    slower than float32.
    """
    best = 0.0
    for size in (256, 512, 1024, 2048) if device.type == "cpu" else (4096, 8192):
        if best and (_WARM_UPS + 5) * 2 * size**3 / best > seconds:
            break
        a = torch.randn(size, size, device=device).to(dtype)
        b = torch.randn(size, size, device=device).to(dtype)
        best = max(best, 2 * size**3 / _fastest(partial(torch.mm, a, b), device, seconds))
    return best


def copy_bandwidth(device: torch.device, seconds: float = 1.0) -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.zeros(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _fastest(lambda: target.copy_(source), device, seconds)


def ceilings(dtypes: list[torch.dtype], device: torch.device, seconds: float = 1.0) -> dict[str, float]:
    """The machine's ceilings: "flops:<dtype>" and "bytes" per second, with torch's number of threads.

    On a CPU: the native core's loop of independent multiply-adds (FMA, bf16 dot product), which is not memory-bound, if
    it has one for the dtype and that is faster; else torch's matmul.
    """
    found = {"bytes": copy_bandwidth(device, seconds)}
    for dtype in dtypes:
        peak = matmul_peak(dtype, device, seconds)
        if device.type == "cpu" and native.why_absent() is None:
            code = native.view(torch.empty(0, dtype=dtype))
            assert code is not None
            peak = max(peak, native.core.measure_peak(code[1], torch.get_num_threads(), seconds))
        found[f"flops:{str(dtype).removeprefix('torch.')}"] = peak
    return found
