"""The docs match the code: variables, kernels, files, links."""

import re
from pathlib import Path

import pytest

from mmkernels.runtime.backends import FAMILIES, VERIFIED_ON_GPU

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
PAGES += sorted(ROOT.glob("mmkernels/**/README.md"))


def sources(*patterns: str) -> list[Path]:
    return [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]


# Environment variables

_READS = re.compile(
    r"""environ(?:\.get\(|\.setdefault\(|\[)\s*["'](\w+)|getenv\(\s*["'](\w+)|ENV\{(\w+)\}|if\.env\.(\w+)|set\((MMKERNELS_\w+)"""
)
# Shown in the report but without effect.
_SHOWN_ONLY = {"OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"}


def variables_read() -> set[str]:
    files = sources("mmkernels/**/*.py", "csrc/**/*", "cmake/*", "CMakeLists.txt", "pyproject.toml")
    texts = [
        path.read_text(encoding="utf-8")
        for path in files
        if path.suffix in {".py", ".h", ".cpp", ".cu", ".cmake", ".txt", ".toml"}
    ]
    return {name for text in texts for groups in _READS.findall(text) for name in groups if name}


def test_every_variable_is_documented() -> None:
    documented = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", (ROOT / "docs/environment.md").read_text(encoding="utf-8")))
    read = variables_read()
    assert "TRITON_INTERPRET" in read  # the search works
    assert "MMKERNELS_CPU_ISA" in read
    assert read - documented - _SHOWN_ONLY == set()


def test_no_variable_is_documented_that_nobody_reads() -> None:
    documented = set(re.findall(r"`(MMKERNELS_\w+)`", (ROOT / "docs/environment.md").read_text(encoding="utf-8")))
    assert documented - variables_read() == set()


# GPU kernels

_CUDA_KERNEL = re.compile(r"__global__\s+(?:void\s+|__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)\s*)+(\w+)\s*\(")
_TRITON_KERNEL = re.compile(r"@triton\.jit(?:\([^)]*\))?\s+def\s+(\w+_kernel)\b")
_NEVER = "not yet run on a GPU"


def gpu_kernels() -> set[tuple[str, str]]:
    """(kernel, file) of every CUDA C++ and Triton kernel."""
    found = set()
    for path in sources("csrc/**/*.cu", "csrc/**/*.cuh", "csrc/**/*.h"):
        found |= {
            (name, str(path.relative_to(ROOT))) for name in _CUDA_KERNEL.findall(path.read_text(encoding="utf-8"))
        }
    for path in sources("mmkernels/ops/**/*.py"):
        found |= {
            (name, str(path.relative_to(ROOT))) for name in _TRITON_KERNEL.findall(path.read_text(encoding="utf-8"))
        }
    return found


def verified_table() -> dict[tuple[str, str], tuple[str, str, str]]:
    """(kernel, file) -> (device, versions, last pass)."""
    rows = re.findall(
        r"^\| `(\w+)` \| `([^`]+)` \| (.*?) \| (.*?) \| (.*?) \|$",
        (ROOT / "docs/verified.md").read_text(encoding="utf-8"),
        re.M,
    )
    return {(kernel, file): tuple(rest) for kernel, file, *rest in rows}


def test_every_gpu_kernel_has_its_line() -> None:
    listed, there = set(verified_table()), gpu_kernels()
    assert there, "no GPU kernel found"
    assert listed == there, f"missing: {sorted(there - listed)}; gone: {sorted(listed - there)}"


def line_is_complete(device: str, versions: str, last_pass: str) -> bool:
    """Says either that the kernel has never run, or on what it has passed, with which torch, and when."""
    if last_pass == _NEVER:
        return (device, versions) == ("", "")
    has_torch, has_date = re.search(r"torch \d", versions), re.fullmatch(r"20\d\d-\d\d-\d\d", last_pass)
    return bool(device and has_torch and has_date)


def test_every_line_is_complete() -> None:
    assert [kernel for kernel, row in verified_table().items() if not line_is_complete(*row)] == []


@pytest.mark.parametrize(
    ("row", "is_complete"),
    [
        (("", "", _NEVER), True),
        (("H100", "torch 2.11, triton 3.6", "2026-12-01"), True),
        (("H100", "", _NEVER), False),
        (("", "torch 2.11", "2026-12-01"), False),
        (("H100", "triton 3.6", "2026-12-01"), False),
        (("H100", "torch 2.11", "last week"), False),
    ],
)
def test_a_line_that_lacks_something_is_seen(row: tuple[str, str, str], is_complete: bool) -> None:
    assert line_is_complete(*row) == is_complete


@pytest.mark.parametrize("family", FAMILIES)
def test_default_choice_follows_the_table(family: str) -> None:
    passes = [row[2] for (_, file), row in verified_table().items() if file.startswith(f"csrc/{family}/")]
    verified = bool(passes) and _NEVER not in passes
    assert (family in VERIFIED_ON_GPU) == verified


# Files and links


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert not [target for target in targets if not (page.parent / target).exists()]


@pytest.mark.parametrize("page", ["docs/adding-an-op.md", "docs/conventions.md", "CONTRIBUTING.md"])
def test_files_that_are_named_exist(page: str) -> None:
    named = re.findall(
        r"`((?:mmkernels|csrc|tests|benches|docs|cmake)/[\w/.<>-]+|CMakeLists\.txt)`",
        (ROOT / page).read_text(encoding="utf-8"),
    )
    paths = {path.replace("<family>", family) for path in named for family in FAMILIES if "<what>" not in path}
    assert not sorted(path for path in paths if not (ROOT / path).exists())
