"""`mmkernels plan`: how well lengths pack, strategy by strategy, and how evenly ranks share the packs."""

from __future__ import annotations

from mmkernels.plan_cli.command import main

__all__ = ["main"]
