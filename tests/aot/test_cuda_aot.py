"""Every CUDA C++ kernel as built for sm_80, sm_90a and sm_100a, inspected without a GPU: no spills, no local memory,
tensor cores where expected."""

import re
from pathlib import Path

import pytest

from mmkernels.runtime import native
from mmkernels.testing import aot

pytestmark = pytest.mark.aot
needs_kernels = pytest.mark.skipif(not native.has_cuda(), reason="built without CUDA: there is no kernel to check")
needs_nvcc = pytest.mark.skipif(aot.find_nvcc() is None, reason="no nvcc found")

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SOURCES = sorted(CSRC.rglob("*.cu"))

# These must use tensor cores when they take 16-bit floats.
TENSOR_CORE_KERNELS = (
    "attention_fwd_kernel",
    "attention_bwd_dkdv_kernel",
    "attention_bwd_dq_kernel",
    "infonce_stats_kernel",
    "siglip_fwd_kernel",
    "contrastive_grad_tile_kernel",
    "contrastive_accumulate_kernel",
)
# Files with this suffix are for sm_90a only, and their kernels must use wgmma and TMA.
SM90 = "_sm90_"
# Kernel name (a pattern) -> bytes of local memory that a thread may use, with the reason.
LOCAL_BUDGET: dict[str, int] = {}


def problems_of(source: str, reports: dict[str, aot.KernelReport]) -> list[str]:
    found = []
    for name, report in reports.items():
        tensor_cores = name.split("<")[0] in TENSOR_CORE_KERNELS and "f16" in name
        budget = max((size for pattern, size in LOCAL_BUDGET.items() if re.search(pattern, name)), default=0)
        found += report.problems(tensor_cores=tensor_cores, local_budget=budget)
        if SM90 in source:
            missing = {"HGMMA", "UTMALDG"} - set(report.instructions)
            found += [f"{name} {report.arch}: no {instruction}" for instruction in sorted(missing)]
    return found


def compiled(text: str, name: str, arch: str, folder: Path) -> dict[str, aot.KernelReport]:
    source = folder / f"{name}.cu"
    source.write_text(text, encoding="utf-8")
    return aot.compile_cuda(source, arch, CSRC)


def problems_of_text(text: str, name: str, arch: str, folder: Path) -> str:
    return "\n".join(problems_of(name, compiled(text, name, arch, folder)))


def test_there_are_kernels_of_every_family() -> None:
    assert {source.parent.name for source in SOURCES} >= {"attention", "contrastive", "packing"}


def test_tensor_core_kernels_exist() -> None:
    text = "".join(source.read_text(encoding="utf-8") for source in SOURCES)
    assert not [name for name in TENSOR_CORE_KERNELS if not re.search(rf"\b{name}\b", text)]


def test_all_architectures_are_built() -> None:
    listed = re.search(r'MMKERNELS_CUDA_ARCHS "([^"]+)"', (CSRC.parent / "CMakeLists.txt").read_text(encoding="utf-8"))
    assert listed is not None
    assert tuple(f"sm_{arch.removesuffix('-real')}" for arch in listed[1].split(",")) == aot.CUDA_ARCHS


@needs_kernels
@pytest.mark.parametrize("arch", aot.CUDA_ARCHS)
def test_no_spills(arch: str) -> None:
    if not {arch.removeprefix("sm_"), f"{arch.removeprefix('sm_')}-real"} & set(native.cuda_archs()):
        pytest.skip(f"built for {', '.join(native.cuda_archs())} only")
    read = aot.read_cuda(Path(native.core.__file__), arch)
    expected = {source.stem for source in SOURCES if SM90 not in source.name or arch == "sm_90a"}
    assert set(read) == expected
    assert all(read.values()), [source for source, reports in read.items() if not reports]
    problems = [problem for source, reports in read.items() for problem in problems_of(source, reports)]
    assert not problems, "\n".join(problems)


# The gate must be able to fail.

GREEDY = """
__global__ void indexed_kernel(float* x, int n) {  // a register array indexed at run time lives in local memory
  float a[64];
  for (int i = 0; i < 64; ++i) a[i] = x[i * n];
  for (int k = 0; k < n; ++k) a[k % 64] += x[k];
  for (int i = 0; i < 64; ++i) x[i] = a[i];
}
// 32 registers for 64 live values.
__global__ void __launch_bounds__(1024, 2) spilling_kernel(const float* x, float* y, int n) {
  float a[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) a[i] = 0;
  for (int k = threadIdx.x; k < n; k += 1024) {
#pragma unroll
    for (int i = 0; i < 64; ++i) a[i] = a[i] * a[(i + 1) % 64] + x[64 * k + i];
  }
#pragma unroll
  for (int i = 0; i < 64; ++i) y[i * n + threadIdx.x] = a[i];
}
"""


@needs_nvcc
def test_gate_sees_spills_and_local_memory(tmp_path: Path) -> None:
    reports = compiled(GREEDY, "greedy", "sm_80", tmp_path)
    problems = "\n".join(problems_of("greedy", reports))
    assert re.search(r"indexed_kernel.*bytes of local memory", problems), problems
    assert re.search(r"spilling_kernel.*bytes of local memory", problems), problems
    report = next(iter(reports.values()))
    assert any("no tensor-core instruction" in problem for problem in report.problems(tensor_cores=True))


SLOW_WGMMA = """
#include "common/cuda/sm90.h"
using namespace mmk;
using namespace mmk::cuda;
__global__ void touching_kernel(float* out, uint64_t a, uint64_t b) {  // uses the accumulator before it has waited
  float acc[8][4];
  wgmma_fence();
  wgmma<bf16, Major::k, Major::k>(acc, a, b, false);
  acc[0][0] += 1.f;
  wgmma<bf16, Major::k, Major::k>(acc, a, b, true);
  wgmma_commit();
  wgmma_wait<0>();
  accumulator_ready(acc);
  for (int i = 0; i < 8; ++i) out[128 * i + threadIdx.x] = acc[i][0];
}
"""


@needs_nvcc
def test_gate_sees_what_sm90_lacks(tmp_path: Path) -> None:
    problems = problems_of_text(SLOW_WGMMA, "slow_sm90_fwd", "sm_90a", tmp_path)
    assert "wgmma is serialized" in problems and "no UTMALDG" in problems and "no HGMMA" not in problems, problems
    once = SLOW_WGMMA.replace("acc[0][0] += 1.f;", "")
    assert "serialized" not in problems_of_text(once, "quick_sm90_fwd", "sm_90a", tmp_path)


@needs_nvcc
def test_every_atom_of_sm90_compiles(tmp_path: Path) -> None:
    """The emulator's probe uses each of them once."""
    probe = CSRC.parent / "tests/native/sm90_probe.h"
    instance = (
        "template __global__ void mmk::cuda::sm90_probe_kernel<0>(const __grid_constant__ mmk::cuda::ProbeParams);"
    )
    assert not problems_of_text(f'#include "{probe}"\n{instance}\n', "probe_sm90_fwd", "sm_90a", tmp_path)


@needs_nvcc
def test_source_that_does_not_compile_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="undeclared"):
        problems_of_text("__global__ void broken_kernel() { undeclared(); }", "broken", "sm_80", tmp_path)


@needs_nvcc
def test_architecture_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    source, cubin = tmp_path / "empty.cu", tmp_path / "empty.cubin"
    source.write_text("__global__ void empty_kernel() {}", encoding="utf-8")
    aot._run(aot.find_nvcc(), "-cubin", "-arch=sm_80", source, "-o", cubin)
    with pytest.raises(RuntimeError, match="no kernel compiled for sm_90a"):
        aot.read_cuda(cubin, "sm_90a")


@pytest.mark.parametrize(
    ("demangled", "short"),
    [
        ("write_kernel(float*, int)", "write_kernel"),
        (
            "void mmk::(anonymous namespace)::fwd_kernel<mmk::bf16, 64>(mmk::Params<mmk::bf16>)",
            "fwd_kernel<mmk::bf16, 64>",
        ),
        (
            "void mmk::cuda::grad_kernel<(mmk::(anonymous namespace)::Loss)1, float>(P)",
            "grad_kernel<(mmk::Loss)1, float>",
        ),
    ],
)
def test_names_are_shortened(demangled: str, short: str) -> None:
    assert aot._short(demangled) == short
