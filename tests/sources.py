"""Rules for the text of source files, as functions that read a source tree and return what breaks them; test_sources.py
runs them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

# A local path or a package registry: neither belongs in a published file.
_MACHINE = re.compile(
    r"(?<![\w.~-])/(?:work|opt|root|mnt|tmp|home/\w+)/\w|\b(?:registry\.npmjs|files\.pythonhosted|download\.pytorch|pypi)\.(?:org|com)\b"
)
_CODE = {".py", ".pyi", ".h", ".cpp", ".cu", ".cuh"}
_PROSE = {".md", ".toml", ".txt", ".cmake", ".json", ".html", ".cfg", ".yml", ".yaml", ""}
_NO_SOURCES = {".git", ".cache", "build", "dist", "runs", "__pycache__", ".hypothesis"}
_NO_SOURCES |= {".mypy_cache", ".ruff_cache", ".pytest_cache"}

LINES, FUNCTION_LINES, KERNEL_LINES = 400, 60, 150  # docs/conventions.md
LONGER: dict[str, str] = {}  # path -> why it may be longer


def _files(root: Path, suffixes: set[str]) -> Iterator[Path]:
    for path in sorted(root.rglob("*")):
        skipped = any(part in _NO_SOURCES or part.startswith(".venv") for part in path.relative_to(root).parts)
        if path.suffix in suffixes and path.is_file() and not skipped:
            yield path


def _trees(root: Path, *folders: str) -> Iterator[tuple[Path, ast.AST]]:
    """Every Python file in some folders, parsed."""
    for folder in folders:
        for path in sorted(root.joinpath(folder).rglob("*.py")):
            yield path.relative_to(root), ast.parse(path.read_text(encoding="utf-8"), str(path))


def size_problems(root: Path, longer: Mapping[str, str] = LONGER) -> list[str]:
    """Files of code above LINES, and Python functions above FUNCTION_LINES (kernels: KERNEL_LINES) without docstrings.
    `longer` says why a file may be longer; an entry whose file is not longer is an error."""
    lines = {str(path.relative_to(root)): path.read_text(encoding="utf-8").count("\n") for path in _files(root, _CODE)}
    problems = [
        f"{name}: {count} lines, at most {LINES}: split it"
        for name, count in lines.items()
        if count > LINES and name not in longer
    ]
    problems += [
        f"{name}: not above {LINES} lines; take it out of LONGER in tests/sources.py"
        for name in longer
        if lines.get(name, 0) <= LINES
    ]
    for path, tree in _trees(root, "mmkernels", "benches", "scripts", "examples", "tests"):
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                most = (
                    KERNEL_LINES if any("jit" in ast.unparse(each) for each in node.decorator_list) else FUNCTION_LINES
                )
                if _lines_of(node) > most:
                    problems.append(f"{path}:{node.lineno}: {node.name} has {_lines_of(node)} lines, at most {most}")
    return problems


def _lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    docstring = function.body[0] if ast.get_docstring(function) is not None else None
    return _height(function) - (_height(docstring) if docstring is not None else 0)


def _height(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def machine_problems(root: Path) -> list[str]:
    """Files that mention a local path or a registry's host."""
    problems = []
    for path in _files(root, _CODE | _PROSE):
        if path == Path(__file__):
            continue
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(lines, 1):
            found = _MACHINE.search(line)
            if found is not None:
                problems.append(f"{path.relative_to(root)}:{number}: mentions {found[0]!r}")
    return problems


def encoding_problems(root: Path) -> list[str]:
    """Text files read or written in the locale's encoding: in the C locale, that is ASCII.

    Ruff's rule (PLW1514) finds them only where it can infer that something is a path.
    """
    problems = []
    for path, tree in _trees(root, "mmkernels", "benches", "scripts", "tests"):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and _is_of_the_locale(node):
                problems.append(f"{path}:{node.lineno}: {ast.unparse(node.func)} without encoding=")
    return problems


def _is_of_the_locale(call: ast.Call) -> bool:
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    method, name = isinstance(call.func, ast.Attribute), getattr(call.func, "attr", getattr(call.func, "id", ""))
    if "encoding" in named:
        return False
    if name in ("read_text", "write_text"):
        return len(call.args) < (1 if name == "read_text" else 2)
    if name != "open" or (method and ast.unparse(call.func.value) in ("os", "Image", "tarfile")):
        return False
    mode = named.get("mode", next(iter(call.args[0 if method else 1 :]), ast.Constant("r")))
    return isinstance(mode, ast.Constant) and "b" not in str(mode.value)


def view_problems(root: Path) -> list[str]:
    """Calls of `view` (`mmkernels/runtime/native.py`) on a tensor without a reference: a pointer into freed memory."""
    problems = []
    for path, tree in _trees(root, "mmkernels"):
        for node in ast.walk(tree) if path.name == "native.py" else ():
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("view", "native.view") and node.args:
                given = node.args[0]
                reshaped = isinstance(given, ast.Call) and ast.unparse(given.func).endswith(".view")
                if not isinstance(given, (ast.Name, ast.Attribute)) and not reshaped:
                    problems.append(f"{path}:{node.lineno}: view of what nobody holds: {ast.unparse(given)}")
    return problems
