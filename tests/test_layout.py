"""The import and include rules (docs/design.md) hold; and the checkers detect violations."""

from pathlib import Path

import layout
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    "checker",
    [
        layout.import_problems,
        layout.circle_problems,
        layout.module_name_problems,
        layout.public_name_problems,
        layout.include_problems,
        layout.shape_problems,
    ],
)
def test_rule_holds(checker) -> None:
    problems = checker(ROOT)
    assert not problems, "\n".join(problems)


# The checkers: a sound tree, one file that breaks it, and their messages.


def sound_tree(root: Path) -> Path:
    modules = [f"ops/{family}/{name}" for family in layout.FAMILIES for name in ("__init__", "api", "op", "reference")]
    modules += [
        "runtime/native",
        "runtime/backends",
        "pretrain/train",
        "cli",
        "info",
        "nn/__init__",
        "ops/packing/triton_fwd",
    ]
    for name in modules:
        write(root, f"mmkernels/{name}.py", "")
    write(root, "mmkernels/__init__.py", '__all__ = ["attention"]\n')
    for family in layout.FAMILIES:
        write(root, f"csrc/{family}/{family}.h", '#include <cstdint>\n#include "common/tensor.h"\n')
    write(root, "csrc/common/tensor.h", "#include <cstdint>\n")
    return root


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


BAD_IMPORTS = {
    "families do not import each other": ("ops/packing/api.py", "from ..contrastive import api"),
    "nor by their absolute name": ("ops/packing/op.py", "import mmkernels.ops.attention.reference"),
    "nor late": ("ops/packing/op.py", "def f():\n    import mmkernels.ops.attention.reference"),
    "reference knows only torch": ("ops/packing/reference.py", "from mmkernels.runtime import native"),
    "not even numpy": ("ops/packing/reference.py", "import numpy"),
    "op does not look up to api": ("ops/packing/op.py", "from .api import pack"),
    "api goes through op to triton": ("ops/packing/api.py", "def f():\n    from .triton_fwd import gather"),
    "a kernel knows no runtime": ("ops/packing/triton_fwd.py", "from mmkernels.runtime import native"),
    "op loads triton late": ("ops/packing/op.py", "from .triton_fwd import gather"),
    "only kernels need triton": ("ops/packing/op.py", "def f():\n    import triton"),
    "runtime knows no family": ("runtime/backends.py", "from mmkernels.ops.packing import api"),
    "nn goes through api": ("nn/pool.py", "from mmkernels.ops.packing.op import gather"),
    "gradcache goes through api": ("gradcache.py", "from mmkernels.ops.contrastive import op"),
    "pretrain uses public names": ("pretrain/train.py", "from mmkernels.ops.attention import attention"),
    "batch goes through api": ("batch/loss.py", "from mmkernels.ops.packing.op import segment_pool"),
    "planning knows no op": ("planning/plan.py", "from mmkernels.ops.packing import pack"),
    "nobody but itself imports testing": ("ops/packing/triton_fwd.py", "from mmkernels.testing.aot import TritonCase"),
    "not even late": ("ops/packing/triton_fwd.py", "def f():\n    from mmkernels.testing.aot import TritonCase"),
    "nobody below imports pretrain": ("nn/pool.py", "from mmkernels.pretrain import train"),
    "nobody imports the command line": ("pretrain/train.py", "import mmkernels.cli"),
    "extras are for pretrain": ("ops/packing/api.py", "import tqdm"),
    "info works without torch": ("info.py", "import torch"),
    "info loads the runtime late": ("info.py", "from mmkernels.runtime import native"),
    "cli works without tyro": ("cli.py", "import tyro"),
    "every module has a layer": ("stray.py", "import json"),
}


def test_bad_imports_are_seen(tmp_path: Path) -> None:
    assert not layout.import_problems(sound_tree(tmp_path / "sound"))
    for rule, (name, text) in BAD_IMPORTS.items():
        root = sound_tree(tmp_path / rule)
        write(root, f"mmkernels/{name}", text)
        found = layout.import_problems(root)
        assert len(found) == 1 and found[0].startswith(f"mmkernels/{name}:"), f"{rule}: {found}"


GOOD_IMPORTS = {
    "ops/packing/op.py": "from . import reference\ndef f():\n    from .triton_fwd import gather",
    "ops/packing/api.py": "from .op import gather\nfrom mmkernels.runtime import backends",
    "pretrain/train.py": "import tqdm\nfrom mmkernels import attention\nfrom .data import x",
    "info.py": "def f():\n    import torch\n    from mmkernels.runtime import native",
    "nn/pool.py": "from mmkernels.ops.packing import segment_pool",
}


def test_good_imports_pass(tmp_path: Path) -> None:
    sound_tree(tmp_path)
    for name, text in GOOD_IMPORTS.items():
        write(tmp_path, f"mmkernels/{name}", text)
    assert not layout.import_problems(tmp_path)


# A cycle of two, of three, through a package, and cycles that no top-level import shows.
CIRCLES = {
    "two": {"nn/a": "from mmkernels.nn import b", "nn/b": "import mmkernels.nn.a"},
    "three": {
        "nn/a": "from mmkernels.nn.b import f",
        "nn/b": "from mmkernels.nn.c import f",
        "nn/c": "from mmkernels.nn.a import f",
    },
    "its own package": {"nn/__init__": "from mmkernels.nn.a import f", "nn/a": "from mmkernels.nn import f"},
    "late": {"nn/a": "from mmkernels.nn.b import f", "nn/b": "def f():\n    from mmkernels.nn.a import g"},
    "for types": {
        "nn/a": "from mmkernels.nn.b import f",
        "nn/b": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mmkernels.nn.a import G",
    },
}


def test_circles_are_seen(tmp_path: Path) -> None:
    for kind, files in CIRCLES.items():
        root = sound_tree(tmp_path / kind)
        write(root, "mmkernels/nn/above.py", "from mmkernels.nn import a, below")
        write(root, "mmkernels/nn/below.py", "import json")
        write(root, "mmkernels/nn/a.py", "from mmkernels.nn import below")
        assert not layout.circle_problems(root)
        for name, text in files.items():
            write(root, f"mmkernels/{name}.py", text)
        (found,) = layout.circle_problems(root)
        way = found.split(" -> ")
        assert way[0] == way[-1], kind
        modules = {f"mmkernels.{name}".replace("/", ".").removesuffix(".__init__") for name in files}
        assert set(way) == modules, kind


def test_underscore_modules_are_seen(tmp_path: Path) -> None:
    sound_tree(tmp_path)
    write(tmp_path, "mmkernels/_native.pyi", "")
    assert not layout.module_name_problems(tmp_path)
    names = ["mmkernels/_hidden/__init__.py", "mmkernels/ops/packing/_impls.py"]
    for name in names:
        write(tmp_path, name, "")
    assert [found.partition(":")[0] for found in layout.module_name_problems(tmp_path)] == names


def test_private_name_is_seen(tmp_path: Path) -> None:
    sound_tree(tmp_path)
    write(tmp_path, "mmkernels/pretrain/train.py", "from mmkernels import attention, _secret")
    (found,) = layout.public_name_problems(tmp_path)
    assert "mmkernels._secret is not public" in found


BAD_INCLUDES = {
    "no torch header": ("attention/a.cpp", "#include <torch/extension.h>"),
    "one pybind11 file": ("attention/a.cpp", "#include <pybind11/pybind11.h>"),
    "families apart": ("attention/a.cu", '#include "packing/packing.h"'),
    "common looks at no family": ("common/a.h", '#include "packing/packing.h"'),
    "paths from csrc": ("packing/a.cpp", '#include "packing.h"'),
    "the file must be there": ("packing/a.cpp", '#include "common/nowhere.h"'),
}


def test_bad_includes_are_seen(tmp_path: Path) -> None:
    assert not layout.include_problems(sound_tree(tmp_path / "sound"))
    for rule, (name, text) in BAD_INCLUDES.items():
        root = sound_tree(tmp_path / rule)
        write(root, f"csrc/{name}", text)
        found = layout.include_problems(root)
        assert len(found) == 1 and found[0].startswith(f"csrc/{name}:1: "), f"{rule}: {found}"


def test_missing_family_file_and_stray_folder_are_seen(tmp_path: Path) -> None:
    write(sound_tree(tmp_path), "mmkernels/ops/stray/api.py", "")
    problems = layout.shape_problems(tmp_path)
    assert "packing: no mmkernels/ops/packing/README.md" in problems
    assert "packing: no CUDA kernel in csrc/packing" in problems
    assert "mmkernels/ops/stray: not a family that tests/layout.py knows" in problems
