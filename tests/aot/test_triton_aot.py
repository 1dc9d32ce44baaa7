"""Every Triton configuration, compiled for sm_80, sm_90 and sm_100 without a GPU: no spills, no local memory beyond the
case's budget, tensor cores where expected. With `pytest tests/aot --pairs`, of each kernel only configurations in which
every two options meet, the architecture being one.

The compilation runs in its own process: under the interpreter a kernel is not a compilable function.
"""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mmkernels.testing import aot
from mmkernels.testing.pairs import launches

pytest.importorskip("triton", reason="triton is not installed")

pytestmark = pytest.mark.aot

FAMILIES = ("attention", "contrastive", "packing")
PACKAGE = Path(aot.__file__).parents[1]


def run_python(*arguments: str) -> subprocess.CompletedProcess:
    """Run Python where no checkout shadows the installed package, without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True)


def run_gate(*arguments: str) -> dict:
    done = run_python("-m", "mmkernels.testing.aot", "--json", *arguments)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def test_every_family_has_triton_kernels() -> None:
    assert aot.families() == sorted(FAMILIES)


def test_every_triton_kernel_has_a_case() -> None:
    cases = "".join(path.read_text(encoding="utf-8") for path in (PACKAGE / "testing/aot_cases").glob("*.py"))
    sources = [path.read_text(encoding="utf-8") for path in (PACKAGE / "ops").rglob("triton*.py")]
    kernels = [name for text in sources for name in re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE)]
    assert kernels
    assert not [name for name in kernels if not re.search(rf"\b{name}\b", cases)]


@pytest.mark.parametrize("arch", aot.TRITON_ARCHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_family_compiles_without_spills(family: str, arch: int, pytestconfig: pytest.Config) -> None:
    options = ["--pairs"] if pytestconfig.getoption("--pairs", default=False) else []
    result = run_gate(family, "--arch", str(arch), *options)
    assert not result["problems"], "\n".join(result["problems"])
    assert result["reports"], f"{family}: no case for sm_{arch}"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_two_options_meet_in_a_choice(family: str) -> None:
    """Of the arguments that a kernel always has, with each other and with each architecture."""
    given = {case.name: {**case.signature, **case.constexprs} for case in aot.cases(family)}
    absent = {(case.kernel, key) for case in aot.cases(family) for key, x in given[case.name].items() if x is None}
    everything = {(case.name, arch) for case in aot.cases(family) for arch in case.archs}
    chosen = launches(aot.cases(family))
    assert chosen < everything
    pairs: dict[tuple, set] = {}
    for case in aot.cases(family):
        options = [*given[case.name].items()]
        options = [(k, x) for k, x in options if not k.startswith("BLOCK") and (case.kernel, k) not in absent]
        for arch in case.archs:
            for two in itertools.combinations([("arch", arch), *options], 2):
                pairs.setdefault((case.kernel, *two), set()).add((case.name, arch))
    assert not [pair for pair, where in pairs.items() if not where & chosen]


# The gate must be able to fail: this kernel keeps too much in registers and has no matrix product.

GREEDY = """
import sys
import triton
import triton.language as tl
from mmkernels.testing.aot import TritonCase, compile_triton

@triton.jit
def _greedy_kernel(x_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    kept = tl.load(x_ptr + offsets)  # [BLOCK]
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(n):
        total += tl.load(x_ptr + offsets * i) * kept
        kept = kept * tl.sum(total)
    tl.store(x_ptr + offsets, total + kept)

name, block = sys.argv[1:]
case = TritonCase("greedy", _greedy_kernel, {name: "*fp32", "n": "i32"}, {"BLOCK": int(block)}, num_warps=1)
print("|".join(compile_triton(case, 80).problems(tensor_cores=True)))
"""


def run_greedy(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    script = folder / "greedy.py"
    script.write_text(GREEDY, encoding="utf-8")
    return run_python(str(script), *arguments)


@pytest.mark.parametrize(("block", "spills"), [(64, False), (4096, True)])
def test_gate_sees_spills_and_missing_tensor_cores(tmp_path: Path, block: int, spills: bool) -> None:
    done = run_greedy(tmp_path, "x_ptr", str(block))
    assert done.returncode == 0, done.stderr
    assert "no tensor-core instruction" in done.stdout
    assert ("register spills" in done.stdout) is spills, done.stdout


def test_case_must_name_every_argument(tmp_path: Path) -> None:
    done = run_greedy(tmp_path, "y_ptr", "64")
    assert done.returncode != 0
    assert "missing ['x_ptr'], unknown ['y_ptr']" in done.stderr


def test_argument_that_triton_cannot_launch_is_refused(tmp_path: Path) -> None:
    script = tmp_path / "greedy.py"
    script.write_text(GREEDY.replace("x_ptr", "options"), encoding="utf-8")
    done = run_python(str(script), "options", "64")
    assert done.returncode != 0
    assert "argument cannot be named `options`" in done.stderr


def test_interpreted_kernel_is_refused(tmp_path: Path) -> None:
    script = tmp_path / "greedy.py"
    script.write_text(GREEDY, encoding="utf-8")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, script, "x_ptr", "64"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert "is TRITON_INTERPRET set?" in done.stderr
