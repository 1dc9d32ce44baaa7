"""`mmkernels plan`: how well lengths pack under each strategy, and how evenly ranks share the packs."""

from __future__ import annotations

from mmkernels.plan_cli.command import main

__all__ = ["main"]
