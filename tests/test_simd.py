"""The SIMD core of the CPU kernels: its C++ test on every instruction set here, and no symbol shared between sets."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import once
import pytest

ROOT = Path(__file__).resolve().parents[1]
ISAS = ["baseline", "avx2", "avx512", "avx512bf16"]
KERNEL_FILES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*/*_cpu.cpp"))

pytestmark = pytest.mark.slow
needs_compiler = pytest.mark.skipif(
    not (shutil.which("cmake") and shutil.which("c++") and shutil.which("nm")), reason="needs cmake, c++ and nm"
)


@pytest.fixture(scope="module")
def build_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built once, by one of the test processes."""
    own = tmp_path_factory.getbasetemp()
    folder = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    build = folder / "simd_build"
    with once.locked(folder / "simd_build.lock"):
        if not (build / "simd_test").exists():
            _build(build)
    return build


def _build(build: Path) -> None:
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    for command in (
        ["cmake", "-S", str(ROOT / "tests" / "native"), "-B", str(build), *generator],
        ["cmake", "--build", str(build), "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def run_test(build: Path, isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MMKERNELS_CPU_ISA": isa}
    return subprocess.run(
        [str(build / "simd_test"), *arguments], env=environment, capture_output=True, text=True, timeout=300
    )


def shared_symbols(objects: list[Path], isa: str) -> list[str]:
    """Symbols that other objects can see or be merged with but that do not carry the instruction set's name."""
    assert objects
    listing = subprocess.run(
        ["nm", "-C", "--defined-only", *map(str, objects)], capture_output=True, text=True, check=True
    ).stdout
    return foreign_symbols(listing, isa)


def foreign_symbols(listing: str, isa: str) -> list[str]:
    # DW.ref.__gxx_personality_v0 is a pointer to the C++ runtime, the same in every object with an exception table.
    symbols = re.findall(r"^[0-9a-f]+ ([A-Z]|[uvw]) (.+)$", listing, flags=re.MULTILINE)
    own = re.compile(rf"\bmmk::{isa}::|^mmk::\w+_{isa}$")
    return [name for _, name in symbols if not own.search(name) and not name.startswith("DW.ref.")]


@needs_compiler
@pytest.mark.parametrize("isa", ISAS)
def test_on_instruction_set(build_dir: Path, isa: str) -> None:
    available = run_test(build_dir, "", "list").stdout.split()
    assert "baseline" in available
    if isa not in available:
        pytest.skip(f"{isa} is not compiled or this CPU lacks it")
    done = run_test(build_dir, isa)
    assert f"instruction set: {isa}\n" in done.stdout
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("all passed\n")


@needs_compiler
def test_unknown_instruction_set_names_the_choices(build_dir: Path) -> None:
    done = run_test(build_dir, "mmx")
    assert done.returncode == 2
    assert re.search(r'MMKERNELS_CPU_ISA: expected one of \{baseline.*\}, got "mmx"', done.stderr)


# The linker merges a template instantiated in two objects and keeps either one: if its name were the same for two
# instruction sets, AVX-512 code could run on a machine without it.
@needs_compiler
@pytest.mark.parametrize("isa", ISAS)
def test_no_symbol_is_shared_between_sets(build_dir: Path, isa: str) -> None:
    objects = sorted((build_dir / "CMakeFiles" / f"simd_test_{isa}.dir").rglob("*.o"))
    if not objects:
        pytest.skip(f"this compiler does not build {isa}")
    assert shared_symbols(objects, isa) == []


@needs_compiler
@pytest.mark.parametrize("source", KERNEL_FILES)
def test_kernel_file_shares_no_symbol_and_leaves_none_out(tmp_path: Path, source: str) -> None:
    target = tmp_path / "kernel.o"
    # A kernel missing from MMK_DEFINE_KERNELS would be a null pointer. This is an error here and not in the build,
    # because other compilers warn about more.
    options = ["-Werror=missing-field-initializers"]
    options += ["-std=c++17", "-O1", "-fPIC", "-DMMK_ISA=baseline", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["c++", *options, "-c", str(ROOT / source), "-o", str(target)], check=True)
    assert shared_symbols([target], "baseline") == []


def test_symbol_check_finds_what_it_looks_for() -> None:
    listing = "\n".join(
        [
            "0000000000000000 W void mmk::avx512::pack_a<float>(float const*)",
            "0000000000000010 W std::vector<float>::push_back(float&&)",
            "0000000000000020 T mmk::helper(int)",
            "0000000000000030 t mmk::local_helper(int)",
            "0000000000000040 D mmk::foo_avx512",
            "0000000000000050 V typeinfo for mmk::Thing",
        ]
    )
    expected = ["std::vector<float>::push_back(float&&)", "mmk::helper(int)", "typeinfo for mmk::Thing"]
    assert foreign_symbols(listing, "avx512") == expected
