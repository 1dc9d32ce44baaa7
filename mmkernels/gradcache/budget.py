"""Chunk sizes from a budget of memory: probe two sizes, fit peak = a + b·amount, take the largest that fits.

The amount of a chunk is its tokens where it counts them, else the elements of its tensors (`chunks.amount`), so a fit
from one batch applies to the next, whose samples may be longer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmkernels.gradcache.backward import Undo, backward, out_of_memory
from mmkernels.gradcache.chunks import amount, split
from mmkernels.ops.checks import wrong_value

__all__ = ["Fit", "free_memory", "largest_cut", "peak_memory", "probe"]

PROBE = 32  # samples; fewer give a poor fit on a GPU, where kernels and the allocator round up
SHARE = 0.9  # of the free memory: allocators fragment
_NO_LIMIT = 1 << 40


@dataclass
class Fit:
    """The largest chunk that fits, in units of `amount`.

    Attributes:
        largest: the largest amount of a chunk.
        whole: the fixed amount of every chunk, whatever its size.
        each: the average amount of a sample in the probe.
    """

    largest: float
    whole: float
    each: float

    def size(self, each: float) -> int:
        """Samples per chunk if a sample's amount is `each`."""
        room = (self.largest - self.whole) / max(each, 1e-9)
        return max(1, int(min(room * (1 + 1e-9), _NO_LIMIT)))


def probe(value: Any, name: str, measure: Callable[[Any], int], budget: float) -> Fit:
    """Fit the memory of a chunk to its amount.

    Args:
        value: an input; its first samples are measured.
        name: its name in messages.
        measure: chunk -> bytes.
        budget: bytes.

    Raises:
        what `measure` raises, except running out of memory with more than one sample.
    """
    large = min(PROBE, len(split(value, 1, name)))
    while True:
        small = max(1, large // 4)
        chunks = [split(value, size, name)[0] for size in (small, large)]
        try:
            peaks = [measure(chunk) for chunk in chunks]
        except Exception as error:
            if large == 1 or not out_of_memory(error):
                raise
        else:
            break
        large //= 2
    amounts = [amount(chunk) for chunk in chunks]
    if amounts[0] == amounts[1]:  # one sample, or none
        a, b, each, whole = 0.0, peaks[1] / max(amounts[1], 1), float(amounts[1]), 0.0
    else:
        b = (peaks[1] - peaks[0]) / (amounts[1] - amounts[0])
        a = peaks[1] - b * amounts[1]
        each = (amounts[1] - amounts[0]) / (large - small)
        whole = max(amounts[1] - each * large, 0.0)
    return Fit((budget - a) / b if b > 0 else float("inf"), whole, each)


def largest_cut(value: Any, fit: Fit, name: str) -> tuple[int, list[Any]]:
    """The largest size at which no chunk exceeds the fit (1 if a single sample does), and the chunks."""
    size, least = fit.size(fit.each), 1
    chunks = split(value, size, name)
    if len(chunks) > 1:  # the samples of this batch may be shorter than those of the probe
        full = [amount(chunk) for chunk in chunks[:-1]]
        if max(full) <= fit.largest:
            least = size
            size = max(size, fit.size((sum(full) / len(full) - fit.whole) / size))
    while True:
        chunks = split(value, size, name)
        largest = max(map(amount, chunks))
        if largest <= fit.largest or size <= least:
            return size, chunks
        shrunk = size * (fit.largest - fit.whole) / max(largest - fit.whole, 1e-9)
        size = max(least, min(size - 1, int(shrunk * (1 + 1e-9))))


def peak_memory(
    run: Callable[[], list[Tensor]], known: Iterable[Tensor], device: torch.device | None, undo: Undo
) -> int:
    """Bytes that a forward and backward need beyond the memory already in use.

    On a CUDA device the allocator's peak over both; elsewhere the bytes that the forward saves for its backward.

    Args:
        run: returns the outputs of a chunk.
        known: tensors that exist anyway: parameters, inputs.
        device: a CUDA device, or None.
        undo: keeps the gradients that the backward touches.
    """
    if device is not None:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        outputs = run()
        backward(outputs, [torch.zeros_like(out) for out in outputs], undo)
        return torch.cuda.max_memory_allocated(device) - before
    there = {t.untyped_storage().data_ptr() for t in known}
    saved: dict[tuple[int, int], int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in there:
            saved[tensor.data_ptr(), tensor.nbytes] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = run()  # alive until the sum is taken, so that no address is reused
    return sum(saved.values()) if outputs else 0


def free_memory(device: torch.device | None) -> float:
    """Bytes available on a CUDA device, or on the host."""
    if device is not None:
        free, _ = torch.cuda.mem_get_info(device)
        return SHARE * (free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    lines = Path("/proc/meminfo")
    if lines.exists():
        for line in lines.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return SHARE * 1024 * int(line.split()[1])
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return SHARE * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    wrong_value("memory_budget", "bytes, because this system does not report free memory", None)
