"""Peak memory of one call; on a CPU in a process of its own, of which the kernel keeps the high-water mark."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmkernels.bench.case import FAMILIES, Settings, cases_of, contenders
from mmkernels.bench.checks import first_line

__all__ = ["Request", "keep_freed_memory", "peak_memory", "peak_memory_in_child"]

# Imported before the fork: a first backward pass imports SymPy, and torch.utils.checkpoint torch._dynamo.
_IMPORTED = (__name__, *(f"mmkernels.bench.cases.{family}" for family in FAMILIES), "torch._dynamo")

# Parameters of glibc's mallopt.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Let glibc keep what this process frees; returns whether it will.

    By default it gives blocks of 32 MiB and more back, and the system zeroes the pages of each output anew. Contenders
    that only move bytes then mostly wait for that, and their ratios are those of page faults.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # not glibc
        return False
    most = 2**31 - 1
    return all(mallopt(*each) == 1 for each in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, most), (_TOP_PAD, 2**28)))


@dataclass(frozen=True)
class Request:
    """One contender of one point."""

    module: str
    case: str
    point: Mapping[str, Any]
    contender: str
    settings: Settings


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_memory(run: Callable[[], Any], device: torch.device) -> int:
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


def _measured(request: Request) -> int:
    """In the child: a warm-up, at the gate's size if the case has one, then one call."""
    if request.settings.threads:
        torch.set_num_threads(request.settings.threads)
    case, device = cases_of(request.module, request.settings)[request.case], torch.device(request.settings.device)
    run = contenders(case, request.settings)[request.contender].run
    assert run is not None
    inputs = case.setup({**request.point, **(case.gate or {})}, device)
    run(inputs)
    if case.gate:
        inputs = case.setup(request.point, device)
    return peak_memory(lambda: run(inputs), device)


def _answer(request: Request, answers: Any) -> None:
    try:
        answers.send(_measured(request))
    except Exception as error:
        answers.send(first_line(error))


def peak_memory_in_child(request: Request) -> int | str:
    """Peak bytes of one contender in a fresh process, or the reason why there is none.

    The process is forked from one that has imported torch and computed nothing, which takes a tenth of a second.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED))
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(request, theirs), daemon=True)
    child.start()
    theirs.close()
    try:
        found: int | str = ours.recv()
    except EOFError:
        child.join()
        found = f"its process ended with {child.exitcode}"
    child.join()
    return found
