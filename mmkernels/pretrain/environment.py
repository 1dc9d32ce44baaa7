"""Versions and hardware of a run, for its log and report."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

import mmkernels

__all__ = ["environment"]


def environment(device: torch.device) -> dict[str, str]:
    """Versions and hardware, as text."""
    return {
        "mmkernels": getattr(mmkernels, "__version__", "unknown"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "threads": str(torch.get_num_threads()),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({len(names)} logical cores)" if names else platform.processor() or "CPU"
