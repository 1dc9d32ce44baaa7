"""The reference (docs/reference) has every public name exactly once, and docstrings name arguments that exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import griffe
import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(ROOT.glob("docs/reference/*.md"))
# Modules whose public names have an entry; of those that only share code, their users have.
MODULES = ["mmkernels", "mmkernels.nn", "mmkernels.pretrain", "mmkernels.pretrain.data"]
MODULES += [f"mmkernels.pretrain.{part}" for part in ("encoders", "fusion", "metrics", "objectives", "views")]
SHARED = {"mmkernels.integrations.torch_collate", "mmkernels.integrations.torch_stream"}


def integrations(root: Path = ROOT) -> list[str]:
    folder = root / "mmkernels/integrations"
    names = {f"mmkernels.integrations.{path.stem}" for path in folder.glob("*.py")}
    names |= {f"mmkernels.integrations.{path.parent.name}" for path in folder.glob("*/__init__.py")}
    return sorted(names - SHARED - {"mmkernels.integrations.__init__"})


def public(module: str) -> list[str]:
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [f"{module}.{name}" for name in ast.literal_eval(node.value)]
    raise AssertionError(f"{module} has no __all__")


def entries(text: str) -> list[str]:
    return re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)


def test_every_public_name_has_one_entry() -> None:
    wanted = sorted(name for module in [*MODULES, *integrations()] for name in public(module))
    found = sorted(name for page in PAGES for name in entries(page.read_text(encoding="utf-8")))
    assert "mmkernels.infonce" in wanted  # the search works
    assert "mmkernels.integrations.torch_data.PackedSampler" in wanted
    assert sorted(set(wanted) - set(found)) == [], "without an entry in docs/reference"
    assert sorted(set(found) - set(wanted)) == [], "not public"
    assert sorted({name for name in found if found.count(name) > 1}) == [], "twice"


def test_names_that_modules_share_have_an_entry_elsewhere() -> None:
    listed = {name.rpartition(".")[2] for module in integrations() for name in public(module)}
    shared = {name.rpartition(".")[2] for module in SHARED for name in public(module)}
    assert {"PackCollator", "PackedStream"} <= shared & listed


@pytest.fixture(scope="module")
def package() -> griffe.Object:
    loaded = griffe.load("mmkernels", search_paths=[ROOT], docstring_parser="google", resolve_aliases=True)
    assert isinstance(loaded, griffe.Object)
    return loaded


def documented(thing: griffe.Object | griffe.Alias) -> Iterator[griffe.Object | griffe.Alias]:
    yield thing
    for member in thing.members.values() if thing.is_class else ():
        if not member.is_alias and (not member.name.startswith("_") or member.name == "__call__"):
            yield from documented(member)


def unknown_arguments(thing: griffe.Object | griffe.Alias) -> list[str]:
    """Names under Args: that are no arguments of the function, of the class or of its fields."""
    if thing.docstring is None or not (thing.is_function or thing.is_class):
        return []
    there = {each.name.lstrip("*") for each in getattr(thing, "parameters", ())}
    there |= {name for name, member in thing.all_members.items() if member.is_attribute} if thing.is_class else set()
    if {"args", "kwargs"} <= there:  # the arguments are those of another library's class
        return []
    options = {"warn_unknown_params": False, "warn_missing_types": False, "warnings": False}
    named = [
        name.strip(" *")
        for section in thing.docstring.parse("google", **options)
        if section.kind is griffe.DocstringSectionKind.parameters
        for entry in section.value
        for name in entry.name.split(",")
    ]
    return [f"{thing.path}: {name}" for name in named if name not in there]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_docstrings_name_arguments_that_exist(page: Path, package: griffe.Object) -> None:
    for name in entries(page.read_text(encoding="utf-8")):
        thing = package[name.removeprefix("mmkernels.")]
        found = [problem for each in documented(thing) for problem in unknown_arguments(each)]
        assert found == [], name


def test_an_argument_that_does_not_exist_is_seen() -> None:
    arguments = "        x, y: two.\n        w: none.\n        **z: more.\n"
    code = f'def f(x, *, y, **z):\n    """One.\n\n    Args:\n{arguments}    """\n'
    with griffe.temporary_visited_module(code) as module:
        assert unknown_arguments(module["f"]) == ["module.f: w"]
