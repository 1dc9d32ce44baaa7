"""Setup of every test: two threads, a seed, GPU tests only with a GPU, Triton's interpreter without one."""

import os
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported, also by processes that tests start: OpenMP threads that spin while they wait would stall
# those of the other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import interpreter
import pytest
import torch

# Helpers whose assertions should show values as pytest shows those of tests.
pytest.register_assert_rewrite("derivatives", "gradcache.toys", "isas", "planning.problems", "ranks")

if not torch.cuda.is_available():  # before the first kernel is decorated
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.quicken()


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(2)
    if "PYTEST_XDIST_WORKER" in os.environ:  # several workers (pytest -n): one thread each, and each of their processes
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Which package is under test, and what this machine cannot test."""
    import mmkernels
    from mmkernels.runtime import native

    core = native.why_absent()
    if core is None:
        found = native.core.build_info()
        core = f"native core on {found['cpu_isa'] or found['why_no_cpu_isa']}"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device: GPU tests are skipped"
    return [f"mmkernels {mmkernels.__version__} from {mmkernels.__path__[0]}; {core}; {device}"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def _away_from_the_checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """`python -c` puts the working folder first on the path: there a child would import the sources, which have no
    native core, instead of the installed package."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    yield
    os.chdir(before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
