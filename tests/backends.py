"""Backends, dtypes and devices of the ops' tests, and when to skip.

    @backends.every_device
    @backends.every
    @backends.every_dtype
    def test_pack(dtype, backend, device):
        backends.need("packing", backend, dtype, device)

    backend = backends.fixture("packing")       # for a file whose tests all take `backend`, on the CPU

No other file calls `candidates`: a test is skipped with the reason that a user would be given.
"""

from collections.abc import Callable, Sequence

import pytest
import torch

from mmkernels.runtime.backends import candidates

__all__ = ["DTYPES", "every", "every_device", "every_dtype", "fixture", "interpreted", "need"]

BACKENDS = ("native", "triton", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

every = pytest.mark.parametrize("backend", BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def need(family: str, backend: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> str:
    """The backend's name; skips the test if it does not support tensors of this device and dtype."""
    reason = candidates(family, torch.device(device), dtype)[backend]
    if reason is not None:
        pytest.skip(reason)
    return backend


def fixture(
    family: str, names: Sequence[str] = BACKENDS, dtype: torch.dtype = torch.float32
) -> Callable[[pytest.FixtureRequest], str]:
    """A fixture that yields each of these backends in turn."""

    @pytest.fixture(params=names)
    def backend(request: pytest.FixtureRequest) -> str:
        return need(family, request.param, dtype)

    return backend


def interpreted(backend: str, device: str = "cpu") -> bool:
    """Is this Triton's interpreter? Each step of a kernel's loop takes milliseconds: choose small sizes."""
    return backend == "triton" and device == "cpu"
