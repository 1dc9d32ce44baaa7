"""Write `mmkernels/_native.pyi`, the native core's interface for type checkers and readers, from its C++ bindings.

    python scripts/build_native_stub.py            # writes the stub
    python scripts/build_native_stub.py --check    # compares it with the committed one

Names and types come from the lambdas that `csrc/module.cpp` and `csrc/module_cuda.cpp` bind or, where they bind a
launcher directly, from its declaration in a header. `tests/test_native_stub.py` compares the result with the built
module. Needs only Python.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STUB = ROOT / "mmkernels" / "_native.pyi"
SOURCES = ("csrc/module.cpp", "csrc/module_cuda.cpp")

HEAD = '''"""The native core: CPU and CUDA kernels over plain pointers. Written by scripts/build_native_stub.py.

Names that end in `_cuda` exist only in a build with CUDA.
"""

from typing import Any

from mmkernels.runtime.native import View
'''

TYPES = {
    "Tensor": "View | None",
    "Stream": "int",
    "Lengths": "Any",
    "Images": "Any",
    "std::optional<Lengths>": "Any",
    "bool": "bool",
    "int": "int",
    "int64_t": "int",
    "double": "float",
    "Norm": "Norm",
    "PoolMode": "PoolMode",
}
RETURNS = {"void": "None", "int64_t": "int", "double": "float"}

_BOUND = re.compile(r'(?:m\.def|planner)\(\s*"(\w+)",\s*(.*?)(?=\n  (?:m\.def|planner)\(|\n}|\n#)', re.S)
_LAMBDA = re.compile(r"\[[^\]]*\]\(([^)]*)\)")
_ENUM = re.compile(r'py::enum_<\w+>\(m, "(\w+)"\)(.*?);', re.S)


def arguments(declared: str) -> list[tuple[str, str]]:
    """(name, type) of each parameter of a C++ function."""
    found = []
    for parameter in " ".join(declared.split()).split(", "):
        kind, _, name = parameter.replace("const ", "").replace("&", "").rpartition(" ")
        found.append((name, "int" if "*" in parameter else TYPES[kind.strip()]))
    return found


def declaration(name: str) -> tuple[str, str]:
    """Return type and parameters of a function or of a function pointer in a kernel table, from its header."""
    pattern = re.compile(rf"^ *(\w+) (?:\(\*{name}\)|{name})\(([^)]*)\);", re.M | re.S)
    texts = [re.sub(r"//[^\n]*", "", path.read_text(encoding="utf-8")) for path in sorted(ROOT.glob("csrc/*/*.h"))]
    found = {match.groups() for text in texts for match in pattern.finditer(text)}
    assert len(found) == 1, f"{name}: {len(found)} declarations in csrc"
    return found.pop()


def functions(source: str) -> Iterator[str]:
    """Yield a stub line for each function that a file binds."""
    planner = re.search(r"m\.def\(name, \[make\]\(([^)]*)\)", source)
    for name, bound in _BOUND.findall(source):
        of_lambda = _LAMBDA.match(bound)
        member = re.match(r"launcher\([\w:]+, &\w+::(\w+)\)|&mmk::(\w+_cuda)", bound)
        returns = "None" if name.startswith("launch_") else "Any"
        if of_lambda is not None:
            declared = of_lambda[1]
        elif member is not None:
            kind, declared = declaration(member[1] or member[2])
            returns = RETURNS[kind]
        elif bound.startswith("&mmk::plan_") and planner is not None:
            declared = planner[1]
        else:
            declared, returns = "", "dict[str, Any]"
        given = ", ".join(f"{argument}: {kind}" for argument, kind in arguments(declared)) if declared else ""
        yield f"def {name}({given}) -> {returns}: ..."


def enums(source: str) -> Iterator[str]:
    for name, values in _ENUM.findall(source):
        listed = re.findall(r'\.value\("(\w+)"', values)
        lines = [f"    {value}: {name}" for value in listed]
        yield "\n".join([f"class {name}:", "    __members__: dict[str, Any]", *lines])


def stub() -> str:
    sources = [(ROOT / path).read_text(encoding="utf-8") for path in SOURCES]
    classes = "\n\n".join(text for source in sources for text in enums(source))
    listed = "\n".join(sorted({line for source in sources for line in functions(source)}))
    return f"{HEAD}\n{classes}\n\n{listed}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        STUB.write_text(stub(), encoding="utf-8")
        return 0
    if STUB.read_text(encoding="utf-8") == stub():
        return 0
    print(f"{STUB.relative_to(ROOT)} is out of date: run python {Path(__file__).name}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
