"""The recipes that come along: one value `RECIPE` a file. A user's own file works the same way."""

from __future__ import annotations

import difflib
import importlib.util
import pkgutil
import sys
from importlib import import_module
from pathlib import Path

from mmkernels.pretrain.recipe import Recipe

__all__ = ["DEFAULT", "load", "names"]

DEFAULT = "clip"


def names() -> list[str]:
    """Of the recipes that come along, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Recipe:
    """A recipe by its name, or from a Python file with a `RECIPE` in it.

    Raises:
        ValueError: neither; the nearest names are offered.
    """
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"recipe: expected a Python file with a RECIPE in it, got {name}, which does not exist")
        spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
        assert spec is not None and spec.loader is not None, "it ends with .py"
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where dataclasses of its own look for the types of their fields
        try:
            spec.loader.exec_module(module)
        except (ImportError, SyntaxError) as error:
            raise ValueError(f"recipe: {name} cannot be loaded ({type(error).__name__}: {error})") from error
    elif name in names():
        module = import_module(f"{__name__}.{name}")
    else:
        near = difflib.get_close_matches(name, names(), 3, 0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"recipe: expected a file.py or one of {', '.join(names())}, got {name!r}{hint}")
    recipe = getattr(module, "RECIPE", None)
    if not isinstance(recipe, Recipe):
        raise ValueError(f"recipe: expected {name} to have a RECIPE, a mmkernels.pretrain.Recipe, got {recipe!r}")
    return recipe
