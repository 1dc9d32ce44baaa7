"""`mmkernels plan`: how well lengths pack under each strategy, and how evenly ranks share the packs. `mmkernels scale`:
what a training step takes on many ranks."""

from __future__ import annotations

from mmkernels.plan_cli.command import main
from mmkernels.plan_cli.scale import main as scale

__all__ = ["main", "scale"]
