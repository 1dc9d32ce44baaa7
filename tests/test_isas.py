"""The choice of an instruction set; and how the tests choose on less capable processors."""

import os
import re
import subprocess
import sys
from pathlib import Path

import isas
import pytest

from mmkernels.runtime import native

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"

pytestmark = pytest.mark.skipif(native.why_absent() is not None, reason=f"native core: {native.why_absent()}")
richer = [isa for isa in isas.usable() if isa != "baseline"]
needs_more_than_the_baseline = pytest.mark.skipif(not richer, reason="this processor runs the baseline alone")


def run(*command: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MMKERNELS_", "PYTEST_"))}
    return subprocess.run([sys.executable, *command], env={**environment, **variables}, capture_output=True, text=True)


INFO = "import torch; from mmkernels.runtime import native; info = native.core.build_info()\n"


def test_usable_ones_are_compiled_and_in_order() -> None:
    info = native.core.build_info()
    assert info["usable_cpu_isas"] == [isa for isa in info["cpu_isas"] if isa in info["usable_cpu_isas"]]
    assert info["usable_cpu_isas"][0] == "baseline"
    assert info["cpu_isa"] in info["usable_cpu_isas"]
    assert info["why_no_cpu_isa"] is None


@needs_more_than_the_baseline
def test_what_is_hidden_is_as_if_not_there() -> None:
    hidden = richer[-1]
    left = isas.usable()[:-1]
    script = INFO + "print(info['usable_cpu_isas'], info['cpu_isa'] in info['usable_cpu_isas'], len(info['cpu_isas']))"
    done = run("-c", script, MMKERNELS_CPU_HIDE=hidden)
    assert done.stdout == f"{left} True {len(native.core.build_info()['cpu_isas'])}\n", done.stderr


# An unknown name, a set that this processor lacks, and a variable that hides the baseline, which cannot be hidden.
WRONG = {
    "unknown": ({"MMKERNELS_CPU_ISA": "z80"}, r'MMKERNELS_CPU_ISA: expected one of \{baseline.*\}, got "z80"'),
    "lacking": (
        {"MMKERNELS_CPU_ISA": "avx512", "MMKERNELS_CPU_HIDE": "avx2"},
        r'MMKERNELS_CPU_ISA: expected one of \{baseline\}, got "avx512"',
    ),
    "hides nothing": (
        {"MMKERNELS_CPU_HIDE": "baseline"},
        r'MMKERNELS_CPU_HIDE: expected one of \{avx2, avx512, avx512bf16\}, got "baseline"',
    ),
}

CALLS = """
import warnings; warnings.simplefilter("error")
import torch, mmkernels
x, q, scale = torch.randn(6, 8), torch.randn(6, 2, 8), torch.tensor(2.0)
cu, index = torch.tensor([0, 2, 6], dtype=torch.int32), torch.arange(6)
ids = torch.tensor([0, 0, 1, 1, 2, 2])
position = torch.arange(6)
cos_sin = mmkernels.rotary_cos_sin(position, 8, base=1e4)
calls = {
    "attention": lambda b: mmkernels.attention(q, q, q, backend=b),
    "additive": lambda b: mmkernels.additive_attention(q, q, q, q[0], backend=b),
    "rope": lambda b: mmkernels.norm_rope(q, cos_sin=cos_sin, backend=b),
    "gate": lambda b: mmkernels.gated_residual(x, x, torch.tensor(0.5), backend=b),
    "infonce": lambda b: mmkernels.infonce(x, x, scale, backend=b),
    "infonce with ids": lambda b: mmkernels.infonce(x, x, scale, query_ids=ids, key_ids=ids, backend=b),
    "siglip": lambda b: mmkernels.siglip(x, x, scale, -1.0, backend=b),
    "sample_negatives": lambda b: mmkernels.sample_negatives(x, x, scale, backend=b),
    "topk_similar": lambda b: mmkernels.topk_similar(x, x, 2, backend=b),
    "pack": lambda b: mmkernels.pack(x, index, backend=b),
    "unpack": lambda b: mmkernels.unpack(x, index, 6, backend=b),
    "segment_pool": lambda b: mmkernels.segment_pool(x, cu, "mean", backend=b),
}
for name, call in calls.items():
    call("reference")
    for backend in (None, "native"):
        try:
            call(backend)
        except ValueError as error:
            print(name, error)
        else:
            print(name, "ran on something else")
from mmkernels import info
print(info.render(info.collect()).splitlines()[-1])
"""


@pytest.mark.parametrize("case", WRONG)
def test_set_that_cannot_be_had_is_an_error_not_a_fallback(case: str) -> None:
    """Raised by each call that would use it; import and the reference backend work, and `mmkernels info` reports it."""
    variables, message = WRONG[case]
    done = run("-c", CALLS, **variables)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    assert len(lines) == 24
    for line in lines:
        assert re.search(message, line), line
    assert re.fullmatch("warning: the CPU kernels raise: " + message, last)


# The tests of the tests


def test_only_one_file_chooses_sets() -> None:
    """Other files would query this processor's list themselves; the next test covers only tests/isas.py."""
    own = {"isas.py", "test_isas.py", "test_simd.py", "test_docs.py", "test_info.py"}
    choosing = [
        file
        for file in TESTS.rglob("*.py")
        if "MMKERNELS_CPU_ISA" in file.read_text(encoding="utf-8") and file.name not in own
    ]
    assert not choosing


@needs_more_than_the_baseline
@pytest.mark.parametrize("hidden", ["avx2", richer[-1] if richer else "avx512"])
def test_suite_asks_a_poorer_processor_for_what_it_has(hidden: str) -> None:
    """As collected there: tests that need a set exist for the remaining sets only, but for the one in use."""
    in_use = run("-c", INFO + "print(info['cpu_isa'])", MMKERNELS_CPU_HIDE=hidden).stdout.strip()
    left = [isa for isa in isas.usable()[: isas.usable().index(hidden)] if isa != in_use] or ["none"]
    files = [
        file
        for file in TESTS.rglob("test_*.py")
        if "@isas.each" in file.read_text(encoding="utf-8") and file != Path(__file__)
    ]
    options = ["--collect-only", "-q", "-m", "isa", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    done = run(
        "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), *options, *map(str, files), MMKERNELS_CPU_HIDE=hidden
    )
    assert done.returncode == 0, done.stdout
    found = re.findall(r"::\w+\[(\w+)\]$", done.stdout, flags=re.MULTILINE)
    assert len(files) > 2
    assert sorted(found) == sorted(left * len(files))
