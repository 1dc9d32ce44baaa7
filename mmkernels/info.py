"""What is installed, which backend runs and why: `mmkernels info`, `python -m mmkernels.info [--json]`.

It never raises, whatever is missing or broken: what it cannot determine is reported as unknown.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["collect", "main", "render"]

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_ENVIRONMENT = (
    "MMKERNELS_CPU_ISA",
    "MMKERNELS_CPU_HIDE",
    "MMKERNELS_VALIDATE",
    "TRITON_INTERPRET",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> dict[str, Any]:
    packages = {name: _version(name) for name in ("mmkernels", "torch", "triton", "numpy")}
    return {"python": platform.python_version(), "platform": platform.platform(), **packages}


def _native() -> dict[str, Any]:
    """The native core's build info, or why there is no core."""
    with contextlib.suppress(ImportError, OSError):
        import torch  # noqa: F401  # before the core, so that both share one OpenMP runtime
    if importlib.util.find_spec("mmkernels._native") is None:
        from mmkernels.runtime.absence import why_no_core

        return {"why_absent": why_no_core()}
    try:
        core = importlib.import_module("mmkernels._native")
        return {"why_absent": None, **core.build_info()}
    except Exception as error:
        return {"why_absent": f"the native core does not load: {error}"}


def _torch() -> dict[str, Any]:
    try:
        import torch
    except (ImportError, OSError) as error:
        return {"why_absent": str(error)}
    return {"why_absent": None, "cuda": torch.version.cuda, "threads": torch.get_num_threads()}


def _devices() -> list[dict[str, Any]]:
    """Each CUDA device, and whether the compiled kernels run on it."""
    import torch

    from mmkernels.runtime import backends, native

    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        capability = torch.cuda.get_device_capability(index)
        found.append(
            {
                "name": torch.cuda.get_device_name(index),
                "capability": f"{capability[0]}.{capability[1]}",
                "served_by_native": backends.arch_served(capability, native.cuda_archs()),
            }
        )
    return found


def _openmp() -> list[str]:
    """The OpenMP runtimes in this process. Two runtimes mean two thread pools that compete for the cores."""
    maps = Path("/proc/self/maps").read_text("utf-8", "surrogateescape")
    return sorted({path for path in re.findall(r"(/\S*lib(?:g|i?)omp5?[-.\w]*\.so[.\d]*)", maps)})


def _backends() -> list[dict[str, Any]]:
    """For each family, device and dtype: the backend that `backend=None` picks, and why not the others."""
    import torch

    from mmkernels.runtime import backends

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    found = []
    for family in backends.FAMILIES:
        for device in devices:
            for dtype in _DTYPES:
                reasons = backends.defaults(family, torch.device(device), getattr(torch, dtype))
                chosen = next((name for name, why in reasons.items() if why is None), None)
                others = {name: why or f"{chosen} comes first" for name, why in reasons.items() if name != chosen}
                found.append({"family": family, "device": device, "dtype": dtype, "chosen": chosen, "others": others})
    return found


def _guarded(part: Callable[[], Any]) -> Any:
    try:
        return part()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return {"error": f"{type(error).__name__}: {error}"}


def _warnings(report: dict[str, Any]) -> list[str]:
    found = []
    if report["torch"].get("why_absent"):
        found.append(
            "PyTorch cannot be imported; mmkernels needs it: pip install torch (https://pytorch.org says which)"
        )
    if report["native"].get("why_absent"):
        found.append(f"no native core: {report['native']['why_absent']}; Triton and plain PyTorch remain")
    if report["native"].get("why_no_cpu_isa"):
        found.append(f"the CPU kernels raise: {report['native']['why_no_cpu_isa']}")
    if isinstance(report["openmp"], list) and len(report["openmp"]) > 1:
        found.append("several OpenMP runtimes are loaded; their threads compete: " + ", ".join(report["openmp"]))
    for device in report["devices"] if isinstance(report["devices"], list) else []:
        if not device["served_by_native"]:
            found.append(
                f"{device['name']} (sm_{device['capability'].replace('.', '')}): no compiled CUDA kernel supports it"
            )
    return found


def collect() -> dict[str, Any]:
    """The whole report as JSON values. A part that fails is {"error": reason}."""
    report = {
        "versions": _guarded(_versions),
        "torch": _guarded(_torch),
        "native": _guarded(_native),
        "devices": _guarded(_devices),
        "openmp": _guarded(_openmp),
        "cores": _guarded(lambda: len(os.sched_getaffinity(0))),
        "environment": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        "backends": _guarded(_backends),
    }
    report["warnings"] = _guarded(lambda: _warnings(report))
    return report


def _render_native(native: dict[str, Any]) -> list[str]:
    if "error" in native or native["why_absent"]:
        return [f"native core   absent: {native.get('error') or native['why_absent']}"]
    openmp = f"OpenMP {native['openmp']}" if native["openmp"] else "no OpenMP"
    cuda = f"{native['cuda_version']}, for {', '.join(native['cuda_archs'])}" if native["cuda_version"] else "none"
    lacks = [isa for isa in native["cpu_isas"] if isa not in native["usable_cpu_isas"]]
    here = f" (not on this processor: {', '.join(lacks)})" if lacks else ""
    return [
        f"native core   {native['version']}, compiler {native['compiler']}, {openmp}",
        f"  CPU         {native['cpu_isa'] or 'none'} in use; compiled: {', '.join(native['cpu_isas'])}{here}",
        f"  CUDA        {cuda}",
    ]


def _render_backends(rows: list[dict[str, Any]]) -> list[str]:
    """One line for all dtypes with the same result."""
    merged: dict[str, list[str]] = {}
    for row in rows:
        others = "; ".join(f"{name}: {why}" for name, why in row["others"].items())
        merged.setdefault(f"{row['family']}|{row['device']}|{row['chosen']}|{others}", []).append(row["dtype"])
    lines = ["", "backend=None picks"]
    for key, dtypes in merged.items():
        family, device, chosen, others = key.split("|", 3)
        lines.append(f"  {family:12} {device:5} {', '.join(dtypes):36} {chosen:10} ({others})")
    return lines


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    versions = report["versions"]
    if "error" in versions:
        lines = [f"versions      unknown: {versions['error']}"]
    else:
        lines = [f"mmkernels     {versions['mmkernels'] or 'not installed (source tree)'}"]
        lines.append(f"python        {versions['python']} on {versions['platform']}")
        lines += [f"{name:13} {versions[name] or 'not installed'}" for name in ("torch", "triton", "numpy")]
    lines += _render_native(report["native"])
    devices = report["devices"]
    if isinstance(devices, list):
        lines += [f"device        {d['name']}, capability {d['capability']}" for d in devices] or [
            "device        no CUDA device"
        ]
    else:
        lines.append(f"device        unknown: {devices['error']}")
    torch = report["torch"]
    threads = torch.get("threads") or f"unknown ({torch.get('error') or torch.get('why_absent')})"
    lines.append(f"threads       torch {threads}, cores {report['cores']}")
    openmp = report["openmp"]
    lines.append(f"OpenMP        {', '.join(openmp) or 'none loaded' if isinstance(openmp, list) else openmp['error']}")
    lines += [f"environment   {name}={value}" for name, value in report["environment"].items()]
    if isinstance(report["backends"], list):
        lines += _render_backends(report["backends"])
    else:
        lines.append(f"backends      unknown: {report['backends']['error']}")
    warnings = report["warnings"] if isinstance(report["warnings"], list) else [report["warnings"]["error"]]
    return "\n".join([*lines, *(["", *(f"warning: {text}" for text in warnings)] if warnings else [])])


def main(argv: list[str] | None = None) -> int:
    """Show versions, the native core, devices, threads, and the backend of each op with the reasons."""
    parser = argparse.ArgumentParser(prog="mmkernels info", description=main.__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON, for programs and bug reports")
    as_json = parser.parse_args(argv).json
    report = collect()
    print(json.dumps(report, indent=1) if as_json else render(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
