"""The loop knows no recipe: sizes of its files, which of them import which, where the names of recipes occur."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import layout
import pytest

from mmkernels.pretrain.data import EMBEDDED
from mmkernels.pretrain.recipes import names

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / "mmkernels/pretrain"
PARTS = ("encoders", "fusion", "metrics", "objectives", "views")


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_the_loop_fits_on_a_few_screens() -> None:
    sizes = {name: lines(HOME / f"{name}.py") for name in ("recipe", "model", "loop")}
    assert sizes["recipe"] <= 105 and sizes["model"] <= 100 and sizes["loop"] <= 150
    assert sum(sizes.values()) < 350


@pytest.mark.parametrize("folder", PARTS)
def test_a_part_fits_on_a_screen_or_two(folder: str) -> None:
    too_long = {path.name: n for path in (HOME / folder).glob("*.py") if (n := lines(path)) > 140}
    assert not too_long


@pytest.mark.parametrize("name", names())
def test_a_recipe_is_one_value(name: str) -> None:
    path = HOME / "recipes" / f"{name}.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert 12 <= lines(path) <= 45
    *imports, value = tree.body
    assert all(isinstance(node, ast.ImportFrom) for node in imports)
    assert isinstance(value, ast.Assign) and ast.unparse(value.targets[0]) == "RECIPE"
    assert not any(isinstance(node, ast.Lambda | ast.FunctionDef | ast.IfExp) for node in ast.walk(tree))


# What the modules of a place may import of the loop, by prefix; everything else of the loop is not theirs.
BASE = (
    *(
        "batch",
        "blending",
        "candidates",
        "cooccurrence",
        "hashing",
        "pixels",
        "ranks",
        "recipe",
        "region_columns",
        "roster",
    ),
    *("tokenizer", "tokens"),
)
MAY = {
    "blending": (),
    "policies": ("blending", "windows"),
    "mixing": ("blending", "windows"),
    "windows": (),
    "recipe": ("mixing", "policies", "stages"),
    "stages": (),
    "recipes": (*PARTS, "recipe", "recipes", "state"),
    "data": (*BASE, "data", "log_mel"),
    "data_report": (
        *(*BASE, "pages", "data_report", "data", "encoders", "recipes", "setup", "load"),
        *("plotting", "examples", "journal", "run_folder"),
    ),
    "views": (*BASE, "views", "data.seeds"),
    "encoders": (*BASE, "encoders", "layers"),
    "fusion": (*BASE, "fusion", "layers"),
    "objectives": (*BASE, "objectives", "layers", "pool", "seen", "state", "schedule"),
    "metrics": (*BASE, "metrics", "data.base", "data.collate", "data.spaced", "generate"),
    "generate": (*BASE,),
    "model": (*BASE, "seen", "stream"),
    "pool": (*BASE,),
    "ranks": (),
    "roster": ("ranks",),
    "seen": (*BASE,),
    "stream": (*BASE,),
    "state": (*BASE,),
    "layers": (*BASE,),
    "schedule": (*BASE, "data.seeds", "policies"),
}


@cache
def loop_imports() -> dict[str, list[tuple[str, str]]]:
    """place -> (file, module of the loop that it imports)."""
    found: dict[str, list[tuple[str, str]]] = {}
    for path in sorted(HOME.rglob("*.py")):
        place = path.relative_to(HOME).parts[0].removesuffix(".py")
        for item in layout.imports(path, ROOT):
            if item.name.startswith("mmkernels.pretrain."):
                inner = item.name.removeprefix("mmkernels.pretrain.")
                found.setdefault(place, []).append((str(path.relative_to(HOME)), inner))
    return found


@pytest.mark.parametrize("place", MAY)
def test_arrows_point_one_way(place: str) -> None:
    allowed = MAY[place]
    wrong = [
        f"{file} imports {module}"
        for file, module in loop_imports().get(place, [])
        if not any(module == each or module.startswith(f"{each}.") for each in allowed)
    ]
    assert not wrong


def test_no_recipe_is_named_outside_its_file() -> None:
    """As a string, in code: the loop must not know it. (Some are also names of fields or labels of the data.)"""
    words = {field for open_it in EMBEDDED.values() for field in (*open_it().train.fields, *open_it().train.classes)}
    recipes = set(names()) - words - {"caption", "adapters"}  # a column of tables, an option of finetune
    assert {"clip", "albef"} <= recipes, "the search works"
    places = []
    for path in sorted(HOME.rglob("*.py")):
        if path.parent == HOME / "recipes":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and node.value in recipes:
                places.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.value}")
    assert not places


def test_the_page_of_the_recipes_is_current() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/write_recipes.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
