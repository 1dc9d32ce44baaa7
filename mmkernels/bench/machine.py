"""Device, versions and load of a measurement."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from mmkernels.runtime import native

__all__ = ["cpu_model", "machine"]


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith(("model name", "CPU implementer")):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine(device: torch.device) -> dict[str, Any]:
    """What figures of this process depend on, besides the code."""
    info = None if native.why_absent() else native.core.build_info()
    about: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        "isa": "sm_{}{}".format(*torch.cuda.get_device_capability(device))
        if device.type == "cuda"
        else info and info["cpu_isa"],
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "versions": {name: _version(name) for name in ("mmkernels", "torch", "triton", "numpy")}
        | {"python": platform.python_version(), "cuda": torch.version.cuda},
        "native": info or native.why_absent(),
    }
    return about
