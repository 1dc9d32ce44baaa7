"""Ahead-of-time checks of GPU kernels, without a GPU: registers, spills, local and shared memory, tensor cores.

`aot_cases/<family>.py` lists the Triton configurations that a family launches:

    def aot_cases() -> list[TritonCase]:
        return [
            TritonCase(
                name="gather_fwd[bf16]",
                kernel=_gather_fwd_kernel,
                signature={"source_ptr": "*bf16", "index_ptr": "*i64", "out_ptr": "*bf16", "width": "i32:16"},
                constexprs={"BLOCK_M": 32, "BLOCK_E": 128},
            )
        ]

`python -m mmkernels.testing.aot` prints the table of all families, or of those named; with `--pairs`, of a choice in
which every two options meet.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mmkernels.testing.pairs import launches

__all__ = [
    "CUDA_ARCHS",
    "TRITON_ARCHS",
    "KernelReport",
    "TritonCase",
    "compile_cuda",
    "compile_triton",
    "find_nvcc",
    "read_cuda",
]

TRITON_ARCHS = (80, 90, 100)
CUDA_ARCHS = ("sm_80", "sm_90a", "sm_100a")

# Maximum shared memory per block in bytes (CUDA programming guide, technical specifications per capability).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}

# Matrix instructions in SASS: mma.sync is HMMA/IMMA/DMMA/QMMA, wgmma HGMMA/IGMMA/QGMMA, tcgen05 UTCHMMA/UTCQMMA/...
_MATRIX_INSTRUCTION = re.compile(r"\b(?:[HIDQBO]MMA|[HIQB]GMMA|UTC[A-Z]*MMA)\b")
_MATRIX_INSTRUCTION_OF_PTX = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
_SASS_FUNCTION = re.compile(r"^\s*Function : (\S+)", re.MULTILINE)
_RESOURCES = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
# nvcc names an anonymous namespace after its file: _GLOBAL__N__<hash>_<length>_<stem>_cu_<hash>.
_SOURCE = re.compile(r"_GLOBAL__N__[0-9a-f]{8}_\d+_(\w+?)_cu_[0-9a-f]{8}")
_SM90_INSTRUCTION = re.compile(r"\b(HGMMA|UTMALDG)\b")
# ptxas marks the end of a group of wgmmas with "gsb0"; in a serialized kernel every wgmma ends a group.
_WGMMA = re.compile(r"\b[HIQB]GMMA\b[^;]*;")
_PTXAS_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True)
class TritonCase:
    """One specialisation of a Triton kernel, as its launcher launches it.

    Args:
        name: `<what>_<direction>[<configuration>]`, unique in its family.
        kernel: the `@triton.jit` function, or one wrapped by autotune or heuristics.
        signature: type of every argument that is not a constexpr: "*bf16", "*i32", "i64", "fp32", ... Pointers are
            assumed 16-byte aligned, as torch allocates them; ":16" after an integer marks a multiple of 16. None for an
            argument passed as None; a NamedTuple of types for a NamedTuple.
        constexprs: value of every constexpr argument.
        num_warps, num_stages: launch options.
        tensor_cores: whether the kernel must contain tensor-core instructions.
        local_budget: bytes of local memory a thread may use (spills are never allowed).
        archs: compute capabilities (times ten) on which the launcher uses this configuration.
        options: further launch options, such as {"enable_fp_fusion": False}.
    """

    name: str
    kernel: Any
    signature: Mapping[str, Any]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    tensor_cores: bool = False
    local_budget: int = 0
    archs: tuple[int, ...] = TRITON_ARCHS
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class KernelReport:
    """Assembler figures of one kernel: per thread, and shared memory per block in bytes."""

    name: str
    arch: str
    registers: int
    spill_bytes: int
    local_bytes: int
    shared_bytes: int
    has_tensor_core_instructions: bool
    instructions: tuple[str, ...] = ()  # architecture-specific ones: HGMMA, UTMALDG
    serialized: bool = False  # ptxas waits after every wgmma, because its registers are used in flight

    def problems(self, *, tensor_cores: bool, local_budget: int = 0, shared_limit: int | None = None) -> list[str]:
        """Problems of the kernel as messages; empty if there are none."""
        found = []
        if self.spill_bytes:
            found.append(f"{self.spill_bytes} bytes of register spills")
        if self.local_bytes > local_budget:
            found.append(f"{self.local_bytes} bytes of local memory (budget {local_budget})")
        if tensor_cores and not self.has_tensor_core_instructions:
            found.append("no tensor-core instruction")
        if self.serialized:
            found.append("wgmma is serialized")
        if shared_limit is not None and self.shared_bytes > shared_limit:
            found.append(f"{self.shared_bytes} bytes of shared memory (limit {shared_limit})")
        return [f"{self.name} {self.arch}: {problem}" for problem in found]


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, encoding="utf-8")
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def _tool(name: str) -> Path:
    """Path of a CUDA binary utility, from the toolkit or the triton wheel."""
    nvcc = find_nvcc()
    beside = [nvcc.parent / name] if nvcc is not None else []
    on_path = shutil.which(name)
    spec = importlib.util.find_spec("triton")
    in_wheel = [Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name] if spec and spec.origin else []
    for path in [*in_wheel, *beside, *([Path(on_path)] if on_path else [])]:
        if path.exists():
            return path
    raise RuntimeError(f"{name} not found: install the CUDA toolkit or triton (pip install 'mmkernels[triton]')")


def _sections(header: re.Pattern[str], text: str) -> dict[str, str]:
    """What a header names -> the text up to the next header."""
    parts = header.split(text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _resources(text: str) -> dict[str, tuple[int, int, int]]:
    """Kernel -> registers, bytes of local memory per thread, bytes of shared memory per block."""
    figures = {name: tuple(map(int, rest)) for name, *rest in _RESOURCES.findall(text)}
    return {name: (registers, stack + local, shared) for name, (registers, stack, shared, local) in figures.items()}


# Triton


def _jit_function(case: TritonCase) -> Any:
    import triton

    kernel = case.kernel
    while not isinstance(kernel, triton.JITFunction) and hasattr(kernel, "fn") and hasattr(kernel.fn, "arg_names"):
        kernel = kernel.fn
    if not isinstance(kernel, triton.JITFunction):
        raise TypeError(
            f"{case.name}: expected a @triton.jit function, got {type(kernel).__name__} (is TRITON_INTERPRET set?)"
        )
    if "options" in kernel.arg_names:
        raise ValueError(f"{case.name}: a kernel argument cannot be named `options`, a launcher keyword of Triton")
    named = set(case.signature) | set(case.constexprs)
    if named != set(kernel.arg_names):
        raise ValueError(
            f"{case.name}: signature and constexprs must name each argument of {kernel.__name__}; "
            f"missing {sorted(set(kernel.arg_names) - named)}, unknown {sorted(named - set(kernel.arg_names))}"
        )
    return kernel


def _source(case: TritonCase) -> Any:
    """The case as input for Triton's compiler; argument attributes are keyed by path, (3,) or (3, 1)."""
    from triton.compiler import ASTSource

    kernel = _jit_function(case)
    constexprs: dict[tuple[int, ...], Any] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}

    def typed(kind: Any, path: tuple[int, ...]) -> Any:
        if isinstance(kind, tuple):
            return type(kind)(*(typed(part, (*path, i)) for i, part in enumerate(kind)))
        if kind is None:
            constexprs[path] = None
            return "constexpr"
        name, _, multiple = kind.partition(":")
        if multiple == "16" or name.startswith("*"):
            attrs[path] = [["tt.divisibility", 16]]
        return name

    signature = {}
    for position, name in enumerate(kernel.arg_names):
        if name in case.constexprs:
            signature[name], constexprs[(position,)] = "constexpr", case.constexprs[name]
        else:
            signature[name] = typed(case.signature[name], (position,))
    return ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)


def compile_triton(case: TritonCase, arch: int) -> KernelReport:
    """Compile one specialisation for compute capability `arch` (80, 90 or 100) and read its cubin.

    Raises:
        TypeError: the kernel is not a `@triton.jit` function (never one under the interpreter).
        ValueError: the case lacks a kernel argument, or names an unknown one.
        RuntimeError: a tool fails or is missing.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    compiled = triton.compile(_source(case), target=GPUTarget("cuda", arch, 32), options=options)

    name = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        ((registers, local, shared),) = _resources(_run(_tool("cuobjdump"), "--dump-resource-usage", cubin)).values()
        # Spills live in local memory: a kernel without local memory has none, and the assembler need not run again.
        spilled = _spills(case, compiled.asm["ptx"], arch, Path(folder)) if local else 0
    matrix = _MATRIX_INSTRUCTION_OF_PTX.search(compiled.asm["ptx"]) is not None
    # Dynamic shared memory is a launch argument; the cubin holds only the static part.
    return KernelReport(case.name, name, registers, spilled, local, max(shared, int(compiled.metadata.shared)), matrix)


def _spills(case: TritonCase, ptx: str, arch: int, folder: Path) -> int:
    """Bytes of spill stores and loads, which only the assembler's log reports."""
    source = folder / "kernel.ptx"
    source.write_text(ptx, encoding="utf-8")
    ptxas = _tool("ptxas-blackwell" if arch >= 100 else "ptxas")
    fused = [] if case.options.get("enable_fp_fusion", True) else ["--fmad=false"]
    name = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    log = _run(ptxas, "-v", "-lineinfo", *fused, f"--gpu-name={name}", source, "-o", folder / "again.cubin")
    found = _PTXAS_SPILLS.search(log)
    assert found is not None, f"ptxas -v gave no spill figures for {case.name}:\n{log}"
    return int(found[1]) + int(found[2])


# CUDA C++


def find_nvcc() -> Path | None:
    """nvcc on PATH or in a usual toolkit location, else None."""
    places = [os.environ.get(name, "") + "/bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join([*places, "/usr/local/cuda/bin"]))
    return Path(found) if found else None


def read_cuda(binary: Path, arch: str) -> dict[str, dict[str, KernelReport]]:
    """Read every kernel's machine code for `arch` ("sm_80", "sm_90a", "sm_100a") in a built module, object or cubin.

    Returns:
        stem of the `.cu` file ("" for a kernel outside an anonymous namespace) -> kernel name, such as
        `fwd_kernel<mmk::bf16, 64>` -> report. A report counts spills as local memory: the machine code does not tell
        them apart.

    Raises:
        RuntimeError: cuobjdump is missing or fails, or the file has no machine code for `arch`.
    """
    kernels = _resources(_run(_tool("cuobjdump"), "--dump-resource-usage", "-arch", arch, binary))
    functions = _sections(_SASS_FUNCTION, _run(_tool("cuobjdump"), "-sass", "-arch", arch, binary))
    reports = [_report(name, arch, kernels[name], code) for name, code in functions.items() if name in kernels]
    if not reports:
        raise RuntimeError(f"{binary}: no kernel compiled for {arch}")
    filt = shutil.which("cu++filt") or shutil.which("c++filt")
    names = [report.name for report in reports]
    short = [_short(name) for name in _run(filt, *names).splitlines()] if filt else names
    sources: dict[str, dict[str, KernelReport]] = {}
    for name, report in zip(short, reports, strict=True):
        found = _SOURCE.search(report.name)
        of_source = sources.setdefault(found[1] if found else "", {})
        assert name not in of_source, f"duplicate kernel name: {name}"
        of_source[name] = replace(report, name=name)
    return sources


def _report(name: str, arch: str, resources: tuple[int, int, int], sass: str) -> KernelReport:
    registers, local, shared = resources
    wgmmas = _WGMMA.findall(sass)
    return KernelReport(
        name,
        arch,
        registers,
        spill_bytes=0,
        local_bytes=local,
        shared_bytes=shared,
        has_tensor_core_instructions=_MATRIX_INSTRUCTION.search(sass) is not None,
        instructions=tuple(sorted(set(_SM90_INSTRUCTION.findall(sass)))),
        serialized=len(wgmmas) > 1 and all("gsb0" in wgmma for wgmma in wgmmas),
    )


def compile_cuda(source: Path, arch: str, include: Path) -> dict[str, KernelReport]:
    """Compile a `.cu` for `arch` and read it as `read_cuda` does.

    Raises:
        RuntimeError: nvcc is missing, or compilation fails.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc not found (PATH, CUDA_HOME, CUDA_PATH, /usr/local/cuda)")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-DNDEBUG", f"-I{include}"]
        _run(nvcc, "-cubin", f"-arch={arch}", *flags, source, "-o", cubin)
        return {name: report for reports in read_cuda(cubin, arch).values() for name, report in reports.items()}


def _short(demangled: str) -> str:
    """`fwd_kernel<mmk::bf16, 64>` of `void mmk::(anonymous namespace)::fwd_kernel<mmk::bf16, 64>(mmk::Params<...>)`."""
    name = demangled.replace("(anonymous namespace)::", "").removeprefix("void ")
    depth, end = 0, len(name)
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            end = i
            break
    head, template, arguments = name[:end].partition("<")
    return head.split("::")[-1] + template + arguments


# Discovery and the table


def families() -> list[str]:
    """The families that have Triton kernels."""
    return sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).with_name("aot_cases"))]))


def cases(family: str) -> list[TritonCase]:
    """Every Triton configuration of a family."""
    listed: list[TritonCase] = importlib.import_module(f"mmkernels.testing.aot_cases.{family}").aot_cases()
    assert listed, f"{family}: aot_cases() is empty"
    names = [case.name for case in listed]
    assert len(set(names)) == len(names), f"{family}: duplicate AOT case names: {names}"
    return listed


def check_triton(family: str, arch: int, *, pairs: bool = False) -> tuple[list[KernelReport], list[str]]:
    """Compile a family's cases for one architecture, with `pairs` a choice; returns reports and problem messages."""
    reports, problems = [], []
    listed = cases(family)
    chosen = launches(listed) if pairs else {(case.name, arch) for case in listed if arch in case.archs}
    for case in listed:
        if (case.name, arch) not in chosen:
            continue
        try:
            report = compile_triton(case, arch)
        except Exception as error:
            problems.append(f"{case.name} sm_{arch}: does not compile: {error}")
            continue
        reports.append(report)
        limits = {"local_budget": case.local_budget, "shared_limit": SHARED_LIMIT[arch]}
        problems += report.problems(tensor_cores=case.tensor_cores, **limits)
    return reports, problems


def main(argv: list[str] | None = None) -> int:
    """Print the table of Triton kernels; the exit status is 1 if there was a problem."""
    parser = argparse.ArgumentParser(prog="python -m mmkernels.testing.aot", description=main.__doc__)
    parser.add_argument("family", nargs="*", help="default: all")
    parser.add_argument("--arch", type=int, nargs="*", default=list(TRITON_ARCHS), choices=TRITON_ARCHS)
    parser.add_argument("--pairs", action="store_true", help="only enough cases that every two options meet")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    reports, problems = [], []
    for family in arguments.family or families():
        for arch in arguments.arch:
            more_reports, more_problems = check_triton(family, arch, pairs=arguments.pairs)
            reports += more_reports
            problems += more_problems
    if arguments.json:
        print(json.dumps({"reports": [asdict(report) for report in reports], "problems": problems}))
    else:
        for r in reports:
            matrix = "tensor cores" if r.has_tensor_core_instructions else "-"
            print(
                f"{r.name:60} {r.arch:8} {r.registers:4} registers {r.spill_bytes:5} spilled {r.local_bytes:5} local "
                f"{r.shared_bytes:7} shared  {matrix}"
            )
        print(*problems, sep="\n", file=sys.stderr)
    return 1 if problems or not reports else 0


if __name__ == "__main__":
    sys.exit(main())
