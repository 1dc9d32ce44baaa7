"""The CUDA kernels emulated on the CPU, replacing the native core's CPU launchers.

`csrc/**/*.cu` and `csrc/module_cuda.cpp` are compiled with the C++ compiler against the headers of
tests/native/emulator (emulator.h there says what it checks). `EmulatedCore` gives the result the interface of the
core's CPU side, so that `attention(q, k, v, backend="native")` on CPU tensors goes through the usual Python code and
ends in a CUDA kernel. This is emulation: it does not verify a kernel on a device.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from once import locked
from torch import Tensor

from mmkernels.ops.packing.native import SCATTER_CHUNK
from mmkernels.ops.packing.reference import group_by_row

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
EMULATOR = HERE / "emulator"
CSRC = ROOT / "csrc"
MACHINE = [EMULATOR / f"{part}.cpp" for part in ("emulator", "async", "tma", "wgmma")]
KERNELS = sorted(CSRC.glob("*/*.cu"))
CXX_FLAGS = ["-DMMK_HAVE_SM90", "-std=c++17", "-O2", "-fno-strict-aliasing", "-fPIC", "-fvisibility=hidden"]
CXX_FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]

_BYTES = {0: 4, 1: 2, 2: 2, 3: 8, 4: 4, 5: 8, 6: 1}  # of the dtype codes of mmkernels.runtime.native
_DTYPES = {0: torch.float32, 1: torch.bfloat16, 2: torch.float16, 4: torch.int32, 5: torch.int64, 6: torch.uint8}


def compiler() -> str | None:
    """The C++ compiler, or None without one."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def _digest(sources: Sequence[Path]) -> str:
    text = hashlib.sha256(f"{sys.version} {compiler()} {CXX_FLAGS}".encode())
    headers = [*CSRC.rglob("*.h"), *EMULATOR.rglob("*.h")]
    for path in sorted({*sources, *headers}):
        text.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return text.hexdigest()[:16]


def _compile(library: Path, sources: Sequence[Path], includes: Sequence[Path]) -> None:
    folder = library.parent
    folder.mkdir(parents=True, exist_ok=True)
    flags = [*CXX_FLAGS, *(f"-I{path}" for path in includes[:2]), *(f"-isystem{path}" for path in includes[2:])]

    def compiled(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        command = [str(compiler()), *flags, "-x", "c++", "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{source.relative_to(ROOT)} does not compile:\n{done.stderr[-4000:]}")
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    partial = library.with_suffix(".partial")
    subprocess.run([str(compiler()), "-shared", "-o", str(partial), *map(str, objects)], check=True)
    partial.replace(library)


def build(name: str, sources: Sequence[Path]) -> ModuleType:
    """Compile a pybind11 module from .cu and .cpp files against the emulator; built once per content."""
    import pybind11

    folder = ROOT / ".cache" / "cuda_emulator" / f"{name}-{_digest(sources)}"
    library = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [EMULATOR, CSRC, Path(pybind11.get_include()), Path(sysconfig.get_paths()["include"])]
    with locked(folder.with_suffix(".lock")):
        if not library.exists():
            _compile(library, sources, includes)
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def emulated_module() -> ModuleType:
    """The launchers of csrc/module_cuda.cpp over emulated kernels."""
    slowest = [CSRC / "module_cuda.cpp", EMULATOR / "module.cpp"]
    return build("mmk_emulated", [*slowest, *KERNELS, *MACHINE])


def _is_view(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 4


def _span(view: Any) -> int:
    """Bytes from the first element of a view to the end of its last; 0 when it is empty."""
    _, code, sizes, strides = view
    if 0 in sizes:
        return 0
    return (1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))) * _BYTES[code]


def _tensor(view: Any) -> Tensor:
    """The contiguous tensor behind a view."""
    pointer, code, sizes, _ = view
    if 0 in sizes:
        return torch.empty(sizes, dtype=_DTYPES[code])
    buffer = (ctypes.c_uint8 * _span(view)).from_address(pointer)
    return torch.frombuffer(buffer, dtype=_DTYPES[code]).view(sizes)


class EmulatedCore:
    """The native core as `mmkernels.runtime.native` expects it; emulated CUDA kernels implement its `*_cpu` launchers.

    Every tensor is copied to memory that ends at an unreadable page (its address modulo 16 is kept), so that a kernel
    that reads or writes past it fails.
    """

    def __init__(self) -> None:
        self.module = emulated_module()
        self.PoolMode = enum.IntEnum("PoolMode", {"sum": 0, "mean": 1, "max": 2, "first": 3})

    def build_info(self) -> dict[str, Any]:
        return {"cuda_version": None, "cuda_archs": [], "cpu_isa": "emulated CUDA"}

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("launch_") or not name.endswith("_cpu"):
            raise AttributeError(name)
        what = name.removeprefix("launch_").removesuffix("_cpu")
        if what.startswith("attention_"):
            return lambda *args: self._attention(what, args[:-1])
        if what.startswith("contrastive_"):
            return lambda *args: self._contrastive(what, args[:-1])
        if what == "packing_scatter_fwd":
            return lambda *args: self._scatter(args[:-1])
        return lambda *args: self._launch(what, args[:-1])

    def _launch(self, what: str, args: Sequence[Any]) -> None:
        with self._fenced(args) as fenced:
            getattr(self.module, f"launch_{what}_cuda")(*fenced, 0)

    def _attention(self, what: str, args: Sequence[Any]) -> None:
        """Of the arguments that end a CPU launcher's list (AttentionExtras), CUDA launchers take the first five, the
        pattern, and the last, the soft cap."""
        beyond = {"attention_fwd": 11, "attention_bwd": 10}[what]
        *args, softcap = args
        assert not any(args[-beyond:]), "attention: the CUDA kernels support no bias, sink, dropout or distances"
        self._launch(what, [*args[:-beyond], softcap])

    def _contrastive(self, what: str, args: Sequence[Any]) -> None:
        """A CUDA launcher needs a workspace, and both gradients whichever are requested."""
        from mmkernels.runtime.native import view

        backward = what.endswith("_bwd")
        queries, keys = args[1:3] if backward else args[:2]
        kept = [torch.empty(x[2], dtype=_DTYPES[x[1]]) for x in (queries, keys)]
        args = [*args[:-2], *(view(k) if a is None else a for a, k in zip(args[-2:], kept, strict=True))]
        size = getattr(self.module, f"{what}_workspace_cuda")(queries[2][0], keys[2][0], queries[2][1])
        workspace = torch.full((size,), 255, dtype=torch.uint8)  # NaN, as far as kernels can tell
        self._launch(what, [*args, view(workspace)])

    def _scatter(self, args: Sequence[Any]) -> None:
        from mmkernels.runtime.native import view

        packed, index, out = args
        order, starts = group_by_row(_tensor(index), out[2][0])
        sums = torch.full((index[2][0] // SCATTER_CHUNK, out[2][1]), torch.nan)
        self._launch("packing_scatter_fwd", [packed, index, view(order), view(starts), view(sums), out])

    @contextmanager
    def _fenced(self, args: Sequence[Any]) -> Iterator[list[Any]]:
        moved, fences = [], []
        for arg in args:
            if not _is_view(arg) or _span(arg) == 0:
                moved.append(arg)
                continue
            size, rest = _span(arg), arg[0] % 16
            start = self.module.fence(size + rest)
            ctypes.memmove(start + rest, arg[0], size)
            fences.append((start, rest, arg[0], size))
            moved.append((start + rest, *arg[1:]))
        try:
            yield moved
            for start, rest, original, size in fences:
                ctypes.memmove(original, start + rest, size)
        finally:
            for start, rest, _, size in fences:
                self.module.unfence(start, size + rest)
