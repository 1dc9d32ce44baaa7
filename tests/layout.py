"""Which modules may import or include which, and which files a family has, as functions that read a source tree and
return its violations. test_layout.py runs them; sources.py has the rules for the text of files.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from layers import FAMILIES, LAYERS, PARTS, Layer

FAMILY_FILES = (
    "__init__.py",
    "api.py",
    "op.py",
    "native.py",
    "reference.py",
    "triton_fwd.py",
    "triton_bwd.py",
    "README.md",
)
PART_FILES = tuple(name for name in FAMILY_FILES if name != "README.md")

# Files that bind the launchers and do nothing else.
PYBIND11_FILES = ("csrc/module.cpp", "csrc/module_cuda.cpp", "csrc/common/binding.h")


@dataclass(frozen=True)
class Import:
    """One imported module, and whether importing the file imports it too."""

    name: str
    line: int
    eager: bool
    names: tuple[str, ...] = ()


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _nodes_inside(tree: ast.AST, kinds: tuple[type[ast.AST], ...]) -> set[int]:
    return {id(node) for outer in ast.walk(tree) if isinstance(outer, kinds) for node in ast.walk(outer)}


def imports(path: Path, root: Path) -> Iterator[Import]:
    """Every module that a file imports. `from a import b` counts as `a.b` when that is a module of the tree."""
    package = module_name(path, root).split(".")
    package = package if path.stem == "__init__" else package[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    late = _nodes_inside(tree, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
    for branch in ast.walk(tree):
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.dump(branch.test):
            late |= {id(node) for node in ast.walk(branch)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, id(node) not in late)
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else []
            parts = [*parts, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                inner = root.joinpath(*parts, alias.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").exists()
                name = ".".join([*parts, alias.name] if is_module else parts)
                yield Import(name, node.lineno, id(node) not in late, () if is_module else (alias.name,))


def _matches(name: str, patterns: tuple[str, ...], family: str) -> bool:
    for pattern in patterns:
        regex = pattern.replace(".", r"\.").replace("{f}", family).replace("{any}", f"({'|'.join(FAMILIES)})")
        regex = regex.replace("_*", r"_\w+").replace(r"\.*", r"(\..*)?")
        if re.fullmatch(regex, name):
            return True
    return False


def _layer(module: str) -> tuple[Layer | None, str]:
    for layer in LAYERS:
        found = re.fullmatch(layer.module, module)
        if found is not None:
            return layer, found.groupdict().get("f", "")
    return None, ""


def import_problems(root: Path) -> list[str]:
    """Imports in `mmkernels/` that point the wrong way, come too early, or need a package that the layer may not."""
    problems = []
    for path in sorted(root.joinpath("mmkernels").rglob("*.py")):
        module = module_name(path, root)
        layer, family = _layer(module)
        if layer is None:
            problems.append(f"{path.relative_to(root)}: {module} has no layer: give it one in tests/layout.py")
            continue
        for item in imports(path, root):
            where = f"{path.relative_to(root)}:{item.line}: {module}"
            top = item.name.split(".")[0]
            if top == "mmkernels":
                if not _matches(item.name, layer.below, family) or _matches(item.name, layer.never, family):
                    problems.append(f"{where} must not import {item.name}")
                    continue
            elif top not in sys.stdlib_module_names and top not in layer.packages:
                problems.append(f"{where} must not need the package {top}")
                continue
            if item.eager and _matches(item.name, tuple(f"{name}.*" for name in layer.late), family):
                problems.append(f"{where} imports {item.name} at the top; it must work without")
    return problems


def circle_problems(root: Path) -> list[str]:
    """Files in `mmkernels/` that import each other: a late or type-only import hides a cycle but does not break it."""
    files = sorted(root.joinpath("mmkernels").rglob("*.py"))
    below = {module_name(path, root): sorted({item.name for item in imports(path, root)}) for path in files}
    problems, done = [], set()

    def follow(module: str, way: list[str]) -> None:
        if module in way:
            problems.append(" -> ".join([*way[way.index(module) :], module]))
        elif module in below and module not in done:
            for name in below[module]:
                follow(name, [*way, module])
            done.add(module)

    for module in below:
        follow(module, [])
    return problems


def module_name_problems(root: Path) -> list[str]:
    """Modules and packages in `mmkernels/` that begin with an underscore: a package's `__init__` says what is public.
    The compiled `_native` is not source."""
    paths = [path.relative_to(root) for path in sorted(root.joinpath("mmkernels").rglob("*.py"))]
    return [
        f"{path}: a module's name begins with no underscore"
        for path in paths
        if any(part.startswith("_") and part not in ("__init__", "__main__") for part in path.with_suffix("").parts)
    ]


def public_name_problems(root: Path) -> list[str]:
    """`from mmkernels import x` in pretrain and integrations: x must be public."""
    tree = ast.parse(root.joinpath("mmkernels/__init__.py").read_text(encoding="utf-8"))
    public: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            public = set(ast.literal_eval(node.value))
    problems = []
    for folder in ("pretrain", "integrations"):
        for path in sorted(root.joinpath("mmkernels", folder).rglob("*.py")):
            for item in imports(path, root):
                private = [name for name in item.names if item.name == "mmkernels" and name not in public]
                problems += [
                    f"{path.relative_to(root)}:{item.line}: mmkernels.{name} is not public" for name in private
                ]
    return problems


def include_problems(root: Path) -> list[str]:
    """`#include` lines in `csrc/` that point the wrong way."""
    problems = []
    for path in sorted(root.joinpath("csrc").rglob("*")):
        if path.suffix not in (".h", ".cuh", ".cpp", ".cu"):
            continue
        folder = path.relative_to(root / "csrc").parts[0]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found = re.match(r'\s*#\s*include\s*([<"])([^>"]+)', line)
            if found is None:
                continue
            quoted, name = found[1] == '"', found[2]
            top = name.split("/")[0]
            where = f"{path.relative_to(root)}:{number}"
            if top in ("torch", "ATen", "c10", "Python.h"):
                problems.append(f"{where}: the core knows no {top}, but includes {name}")
            elif top == "pybind11" and str(path.relative_to(root)) not in PYBIND11_FILES:
                problems.append(f"{where}: pybind11 is for {', '.join(PYBIND11_FILES)} only, but this includes {name}")
            elif quoted and folder == "common" and top != "common":
                problems.append(f"{where}: common includes only common, not {name}")
            elif quoted and folder in FAMILIES and top not in ("common", folder):
                problems.append(f"{where}: csrc/{folder} includes only common and itself, not {name}")
            elif quoted and not (root / "csrc" / name).exists():
                problems.append(f"{where}: no file csrc/{name}; paths are written from csrc")
    return problems


def shape_problems(root: Path) -> list[str]:
    """Families that lack a file which every family has, and folders in ops/ that are not families."""
    problems = []
    for family in FAMILIES:
        folder = root / "mmkernels/ops" / family
        wanted = [folder / name for name in FAMILY_FILES]
        wanted += [root / f"csrc/{family}/{family}.h", root / f"csrc/{family}/{family}_cpu.cpp"]
        wanted += [root / f"benches/bench_{family}.py", root / f"tests/ops/{family}"]
        problems += [f"{family}: no {path.relative_to(root)}" for path in wanted if not path.exists()]
        for part in PARTS.get(family, ()):
            wanted = [folder / part / name for name in PART_FILES]
            wanted += [root / f"csrc/{family}/{part}{end}" for end in (".h", "_cpu.cpp")]
            wanted += [root / f"tests/ops/{family}/test_{part}.py"]
            problems += [f"{family}: no {path.relative_to(root)}" for path in wanted if not path.exists()]
        if not list(root.joinpath("csrc", family).glob("*.cu")):
            problems.append(f"{family}: no CUDA kernel in csrc/{family}")
    folders = {
        path.name for path in root.joinpath("mmkernels/ops").iterdir() if path.is_dir() and path.name != "__pycache__"
    }
    return problems + [
        f"mmkernels/ops/{name}: not a family that tests/layout.py knows" for name in sorted(folders - set(FAMILIES))
    ]
