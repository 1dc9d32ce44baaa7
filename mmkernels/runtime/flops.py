"""FLOP formulas of the ops, for `torch.utils.flop_counter.FlopCounterMode`.

Importing the counter imports Triton, so this module never does: it registers its formulas once the user's program has
imported the counter.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

__all__ = ["register_flops"]

_COUNTER = "torch.utils.flop_counter"
_waiting: list[tuple[Any, Callable[..., int]]] = []


def register_flops(op: Any, formula: Callable[..., int]) -> None:
    """Count an op (`torch.ops.mmkernels.<name>`) by a formula over its arguments."""
    _waiting.append((op, formula))
    if _COUNTER in sys.modules:
        _hand_over(sys.modules[_COUNTER])


def _hand_over(counter: ModuleType) -> None:
    while _waiting:
        op, formula = _waiting.pop()

        def count(*args: Any, out_val: Any = None, _formula: Callable[..., int] = formula, **kwargs: Any) -> int:
            return _formula(*args, **kwargs)

        counter.register_flop_formula(op, get_raw=True)(count)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Hooks the first import of the counter, and registers the formulas after its module has run."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        loader, run = spec.loader, spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _hand_over(module)

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _WhenImported())
