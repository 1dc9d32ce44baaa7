"""A recipe as a tree of settings, `objectives.contrast.weight`, for the command line, the run folder and `--help`."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import pairwise
from typing import Annotated, Any

import tyro

from mmkernels.pretrain.recipe import Recipe

__all__ = ["BRANCHES", "leaves", "typed", "with_leaves"]

# The fields of a recipe that a run may change; the others describe it.
BRANCHES = ("model", "streams", "fusion", "objectives", "metrics", "stages", "draw", "policy", "mixing")
ALIASES = {"policy.kind": "--policy", "mixing.kind": "--mixing"}  # further names on the command line


def leaves(recipe: Recipe) -> dict[str, Any]:
    """Dotted name -> value of every setting, JSON values."""
    found: dict[str, Any] = {}
    for branch in BRANCHES:
        _collect(branch, getattr(recipe, branch), found)
    return found


def with_leaves(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with some settings changed.

    Raises:
        ValueError: it has no such setting (the nearest names are offered), or a part refuses a value.
    """
    known = leaves(recipe)
    for name in changes:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3) or list(known)[:3]
            raise ValueError(f"{name}: expected a setting of this recipe, such as {', '.join(near)}")
    changed = {branch: _rebuilt(branch, getattr(recipe, branch), changes) for branch in BRANCHES}
    return dataclasses.replace(recipe, **changed)


def typed(recipe: Recipe) -> tuple[list[tuple[str, Any, Any]], dict[str, Any]]:
    """For tyro: (name, type, default) of every branch that has settings; and the defaults themselves."""
    fields: list[tuple[str, Any, Any]] = []
    for branch in BRANCHES:
        value = getattr(recipe, branch)
        if isinstance(value, bool):
            fields.append((branch, Annotated[bool, tyro.conf.arg(help=_docs_of(Recipe).get(branch))], value))
        elif value is not None and leaves_of(value):
            fields.append((branch, *_typed(value, branch)))
    return fields, {name: default for name, _, default in fields}


def leaves_of(value: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    _collect("", value, found)
    return found


def members(value: Any) -> Iterator[tuple[str, Any]] | None:
    """The named members of a branch; None for a leaf. Those of a tuple are called by their types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
    if isinstance(value, Mapping):
        return iter(value.items())
    if isinstance(value, tuple) and value and all(dataclasses.is_dataclass(each) for each in value):
        return iter(_numbered([type(each).__name__.lower() for each in value], value))
    return None


def _numbered(names: list[str], values: tuple[Any, ...]) -> list[tuple[str, Any]]:
    """Names that occur several times get a number: stage_0, stage_1."""
    return [
        (f"{name}_{names[:i].count(name)}" if names.count(name) > 1 else name, value)
        for i, (name, value) in enumerate(zip(names, values, strict=True))
    ]


def _collect(path: str, value: Any, into: dict[str, Any]) -> None:
    inner = members(value)
    if inner is None:
        into[path] = list(value) if isinstance(value, tuple) else value
        return
    for name, member in inner:
        _collect(f"{path}.{name}" if path else name, member, into)


def _rebuilt(path: str, value: Any, changes: Mapping[str, Any]) -> Any:
    inner = members(value)
    if inner is None:
        new = changes.get(path, value)  # of a run folder: JSON has no tuples
        return tuple(new) if isinstance(new, list) and not isinstance(value, list) else new
    made = {name: _rebuilt(f"{path}.{name}", member, changes) for name, member in inner}
    if isinstance(value, Mapping):
        return made
    return tuple(made.values()) if isinstance(value, tuple) else dataclasses.replace(value, **made)


def _typed(value: Any, path: str) -> tuple[type, Any]:
    """A dataclass with a field per setting of a branch, typed as its part is, and its default."""
    hints = typing.get_type_hints(type(value)) if dataclasses.is_dataclass(value) else {}
    of: Any = type(value)
    docs = _docs_of(of) if dataclasses.is_dataclass(value) else {}
    fields: list[tuple[str, Any, Any]] = []
    for name, member in members(value) or ():
        if members(member) is None:
            alias = ALIASES.get(f"{path}.{name}")
            about = tyro.conf.arg(help=docs.get(name), aliases=[alias] if alias else None)
            fields.append((name, Annotated[_of_leaf(hints[name]), about], dataclasses.field(default=member)))
        elif leaves_of(member):
            kind, default = _typed(member, f"{path}.{name}")
            fields.append((name, kind, dataclasses.field(default=default)))
    bases = (_Plain,)
    made = dataclasses.make_dataclass(type(value).__name__, fields, frozen=True, bases=bases)
    made.__doc__ = type(value).__doc__ if dataclasses.is_dataclass(value) else ""
    return made, made()


@cache
def _docs_of(kind: Any) -> dict[str, str]:
    """The docstrings under the fields of a dataclass, which only its source has."""
    found, kinds = {}, [each for each in reversed(kind.__mro__) if dataclasses.is_dataclass(each)]
    each: Any
    for each in kinds:
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        except (OSError, TypeError, SyntaxError):  # made while running
            continue
        for field, below in pairwise(getattr(tree, "body", [])):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
                text = below.value.value if isinstance(below.value, ast.Constant) else None
                if isinstance(text, str):
                    found[field.target.id] = " ".join(text.split())
    return found


def _of_leaf(hint: Any) -> Any:
    """`float | Ramp` with a number in it is a float: tyro would make a command of the ramp."""
    plain = [each for each in typing.get_args(hint) if not dataclasses.is_dataclass(each)]
    is_union = isinstance(hint, types.UnionType) and len(plain) < len(typing.get_args(hint))
    return typing.Union[tuple(plain)] if is_union else hint  # noqa: UP007


class _Plain:
    """Base of the generated types: without the parts' own checks, which run when the recipe is rebuilt."""
