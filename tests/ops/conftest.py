"""CUDA kernels in every family's tests: emulated on the CPU, and on a device if there is one."""

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
        """Orders in which threads and blocks run: repeat a call under each; results must be bitwise equal."""
        for seed in (0, 1, 2):
            if self.emulator is not None:
                self.emulator.set_seed(seed)
            yield seed

    def capability(self, capability: int) -> None:
        """Which kernels an emulated device runs (90 for 9.0); a real device uses its own capability."""
        if self.emulator is not None:
            self.emulator.set_capability(capability)

    def multiprocessors(self, count: int) -> None:
        """The size of the emulated device; a real device is unaffected."""
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
    # torch.empty gives NaN, which reveals outputs that no thread writes.
    torch.use_deterministic_algorithms(True)
    yield CudaKernels("cpu", core.module)
    torch.use_deterministic_algorithms(False)
