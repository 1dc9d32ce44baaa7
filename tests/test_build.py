"""The build: no torch in the binary, no libraries that a user may lack, a size within budget, a fallback."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mmkernels
from mmkernels.runtime import native

ROOT = Path(__file__).resolve().parents[1]
MB = 2**20
# Compressed, as users download it. The embedded pictures take 2.4 MB; each CUDA architecture adds to the rest.
WHEEL_BUDGET = 20 * MB

needs_core = pytest.mark.skipif(native.why_absent() is not None, reason=f"native core: {native.why_absent()}")


def test_native_core_is_there_when_it_must_be() -> None:
    if os.environ.get("MMKERNELS_REQUIRE_NATIVE") == "1":
        assert native.why_absent() is None


def tool(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]}")
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@needs_core
def test_no_torch_symbol() -> None:
    symbols = tool("nm", "-D", "--undefined-only", "--demangle", native.core.__file__)
    assert "PyModule_Create2" in symbols or "PyModuleDef_Init" in symbols  # nm could read the module
    foreign = re.findall(r".*\b(?:at::|c10::|torch::|aoti_torch\w*|TH[A-Z]\w+).*", symbols)
    assert not foreign, "\n".join(foreign)


@needs_core
def test_loads_only_what_every_linux_has() -> None:
    needed = re.findall(r"NEEDED\s+(\S+)", tool("objdump", "-p", native.core.__file__))
    assert needed
    allowed = r"(libstdc\+\+|libm|libgcc_s|libgomp|libc|libpthread|libdl|librt|ld-linux[-\w]*)\.so\.\d+"
    assert not [name for name in needed if not re.fullmatch(allowed, name)], needed


def test_no_flag_for_one_machine() -> None:
    files = [ROOT / "CMakeLists.txt", *(ROOT / "cmake").iterdir()]
    assert not [file.name for file in files if "march=native" in file.read_text(encoding="utf-8")]


@needs_core
def test_one_openmp_runtime(tmp_path: Path) -> None:
    script = "from mmkernels import info\nprint(info.collect()['openmp'])"
    ran = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert ran.stdout.count("omp") == 1, ran.stdout + ran.stderr


def pip_wheel(target: Path, **environment: str) -> subprocess.CompletedProcess:
    """Build a wheel from the checkout with the environment's build tools, without downloads."""
    source = target / "source"
    skip = shutil.ignore_patterns(".git", ".venv", "build", "dist", "runs", "__pycache__", "*.so")
    shutil.copytree(ROOT, source, ignore=skip)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", target, source]
    base = {name: value for name, value in os.environ.items() if name != "MMKERNELS_REQUIRE_NATIVE"}
    return subprocess.run(pip, env={**base, **environment}, capture_output=True, text=True)


BUILD_TOOLS = ("cmake", "ninja", "pybind11", "scikit_build_core")
absent = [name for name in BUILD_TOOLS if importlib.util.find_spec(name) is None]
needs_build_tools = pytest.mark.skipif(bool(absent), reason=f"not installed: {', '.join(absent)} (mmkernels[dev])")
BROKEN_COMPILER = "/bin/false"


@pytest.mark.slow
@needs_build_tools
def test_without_a_compiler_the_wheel_is_pure_python_and_says_so(tmp_path: Path) -> None:
    done = pip_wheel(tmp_path, CXX=BROKEN_COMPILER)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    script = """
import pathlib, sys, torch
# What this hides, the package that the tests run on, would be the reason otherwise.
sys.path[:] = [entry for entry in sys.path if not any(pathlib.Path(entry, "mmkernels").glob("_native*.so"))]
import mmkernels
x = torch.nn.functional.normalize(torch.randn(8, 4), dim=-1)
print(mmkernels.infonce(x, x, torch.tensor(10.0)).item())
try:
    mmkernels.infonce(x, x, torch.tensor(10.0), backend="native")
except mmkernels.BackendError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    ran = subprocess.run([sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "RuntimeWarning: mmkernels was built without its native core" in ran.stderr
    assert ran.stderr.count("RuntimeWarning") == 1
    assert "native: mmkernels was built without its native core" in ran.stdout


@pytest.mark.slow
@needs_build_tools
def test_fallback_can_be_forbidden(tmp_path: Path) -> None:
    done = pip_wheel(tmp_path, CXX=BROKEN_COMPILER, MMKERNELS_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert not list(tmp_path.glob("*.whl"))


@pytest.mark.skipif(
    "site-packages" not in mmkernels.__path__[0], reason="run from a source tree, not from an installation"
)
def test_size_is_within_its_budget(tmp_path: Path) -> None:
    package = Path(mmkernels.__path__[0])
    wheel = tmp_path / "as_a_wheel.zip"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in package.rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                archive.write(file, file.relative_to(package.parent))
    assert wheel.stat().st_size <= WHEEL_BUDGET, f"{wheel.stat().st_size / MB:.1f} MB"
