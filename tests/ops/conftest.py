"""CUDA kernels in every family's tests: emulated on the CPU, and on a device where there is one."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mmkernels.runtime import native

sys.path.insert(0, str(Path(__file__).parents[1] / "native"))

import emulation


@dataclass(frozen=True)
class CudaKernels:
    """Where CUDA kernels run in a test: `backend="native"` with tensors on `device`."""

    device: str
    emulator: ModuleType | None

    def schedules(self) -> Iterator[int]:
        """Orders in which threads and blocks run: repeat a call under each, and not a bit may change."""
        for seed in (0, 1, 2):
            if self.emulator is not None:
                self.emulator.set_seed(seed)
            yield seed

    def capability(self, capability: int) -> None:
        """Which kernels an emulated device runs (90 for 9.0); a real one has what it has."""
        if self.emulator is not None:
            self.emulator.set_capability(capability)

    def multiprocessors(self, count: int) -> None:
        """How large the emulated device is; a real one stays as it is."""
        if self.emulator is not None:
            self.emulator.set_multiprocessors(count)


@pytest.fixture(params=["emulated", pytest.param("device", marks=pytest.mark.gpu)])
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaKernels]:
    if request.param == "device":
        yield CudaKernels("cuda", None)
        return
    if emulation.compiler() is None:
        pytest.skip("the emulator needs a C++ compiler")
    core = emulation.EmulatedCore()
    monkeypatch.setattr(native, "core", core)
    monkeypatch.setattr(native, "_why_absent", None)
    core.module.set_seed(1)
    core.module.set_multiprocessors(3)
    core.module.set_capability(80)
    # torch.empty gives NaN: an output that no thread writes shows.
    torch.use_deterministic_algorithms(True)
    yield CudaKernels("cpu", core.module)
    torch.use_deterministic_algorithms(False)
