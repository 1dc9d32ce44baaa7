"""Measure time, peak memory and the machine's ceilings."""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Run = Callable[[], Any]

# Written between repeats on a GPU, so that no contender finds its input in the L2 cache (50 MB on Hopper).
_FLUSH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    median: float
    low: float  # first quartile
    high: float  # third quartile
    repeats: int


@dataclass(frozen=True)
class Work:
    """The work of one call, independent of the algorithm: floating-point operations, bytes moved, items handled."""

    flops: float | None = None
    bytes: float | None = None
    items: float | None = None


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


_LEAST_CALLS = 7  # of `timings`: a warm-up, a first look, five repeats


def timings(runs: Mapping[str, Run], device: torch.device, *, seconds: float, least: int = 5) -> dict[str, Timing]:
    """Time contenders in turn, so that a drift of the machine's speed affects all equally.

    Args:
        runs: name -> call.
        device: where they run.
        seconds: time to spend on each, after one warm-up call.
        least: minimum repeats (3 if a single call takes longer than `seconds`).
    """
    clock = _Clock(device)
    counts, samples = {}, {name: [] for name in runs}
    for name, run in runs.items():
        run()  # compiles, allocates, fills caches
        first = clock(run)
        counts[name] = max(least if first < seconds else 3, min(200, int(seconds / max(first, 1e-6))))
    for round_ in range(max(counts.values(), default=0)):
        for name, run in runs.items():
            if round_ < counts[name]:
                samples[name].append(clock(run))
    result = {}
    for name, taken in samples.items():
        low, median, high = statistics.quantiles(taken, n=4)
        result[name] = Timing(median, low, high, len(taken))
    return result


# Memory


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_memory(run: Run, device: torch.device) -> int:
    """Peak bytes of one call beyond the memory in use before it.

    On a CPU this is the process's high-water mark: call it in a fresh process, after a small warm-up.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with contextlib.suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that stays resident would hide the call's use of it
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # reset the high-water mark to the current RSS
    before = _status("VmRSS")
    result = run()
    peak = _status("VmHWM") - before
    del result
    return max(0, peak)


# Ceilings


def matmul_peak(dtype: torch.dtype, device: torch.device, seconds: float = 1.0) -> float:
    """FLOP/s of torch's matmul, the best of a few sizes.

    Skips sizes that would take longer than `seconds`: without bfloat16 instructions a bfloat16 matmul is 25 times
    slower than float32.
    """
    best = 0.0
    for size in (256, 512, 1024, 2048) if device.type == "cpu" else (4096, 8192):
        if best and _LEAST_CALLS * 2 * size**3 / best > seconds:
            break
        a = torch.randn(size, size, device=device).to(dtype)
        b = torch.randn(size, size, device=device).to(dtype)
        fastest = timings({"mm": lambda a=a, b=b: a @ b}, device, seconds=seconds)["mm"].low
        best = max(best, 2 * size**3 / fastest)
    return best


def copy_bandwidth(device: torch.device, seconds: float = 1.0) -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.zeros(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    fastest = timings({"copy": lambda: target.copy_(source)}, device, seconds=seconds)["copy"].low
    return 2 * source.numel() / fastest


def ceilings(dtypes: list[torch.dtype], device: torch.device, threads: int, seconds: float = 1.0) -> dict[str, float]:
    """The machine's ceilings: "flops:<dtype>" and "bytes" per second.

    On a CPU: the native core's loop of independent multiply-adds (FMA, bf16 dot product), which is not memory-bound, if
    it has one for the dtype and that is faster; else torch's matmul.
    """
    from mmkernels.runtime import native

    found = {"bytes": copy_bandwidth(device, seconds)}
    for dtype in dtypes:
        peak = matmul_peak(dtype, device, seconds)
        if device.type == "cpu" and native.why_absent() is None and hasattr(native.core, "measure_peak"):
            code = native.view(torch.empty(0, dtype=dtype))
            assert code is not None
            peak = max(peak, native.core.measure_peak(code[1], threads, seconds))
        found[f"flops:{str(dtype).removeprefix('torch.')}"] = peak
    return found
