"""Why a package has no native core. Does not import torch, so that `mmkernels info` works without it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

__all__ = ["why_no_core"]


def why_no_core(package: Path | None = None, search: Sequence[str] | None = None) -> str:
    """The reason, and what to do.

    Args:
        package: the folder imported as `mmkernels`; by default the one that contains this file.
        search: folders where another copy may be installed; by default `sys.path`.
    """
    package = (package or Path(__file__).parents[1]).resolve()
    for entry in sys.path if search is None else search:
        other = Path(entry, "mmkernels").resolve()
        if other != package and any((other / f"_native{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
            return (
                f"the sources in {package.parent}, without a native core, hide the mmkernels installed in "
                f"{other.parent}: start Python in another folder, and keep {package.parent} off PYTHONPATH"
            )
    if (package.parent / "csrc").is_dir():
        return (
            f"mmkernels is imported from its sources in {package.parent}, which have no native core: "
            "pip install them, and start Python in another folder"
        )
    return (
        "mmkernels was built without its native core (no C++ compiler at install time? Reinstall with "
        "MMKERNELS_REQUIRE_NATIVE=1 to see the build's error)"
    )
