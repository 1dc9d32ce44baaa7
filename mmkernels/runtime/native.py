"""Loads the native core, or records why it cannot.

Torch is always imported before the core, so that both share one OpenMP runtime.
"""

from __future__ import annotations

import warnings
from typing import NoReturn

import torch
from torch import Tensor

from mmkernels.runtime.absence import why_no_core

__all__ = ["View", "core", "cuda_archs", "has_cuda", "threads", "unit_stride", "view", "why_absent"]

# (data pointer, dtype code, sizes, strides in elements); the core reads it as mmk::Tensor, None as absent.
View = tuple[int, int, tuple[int, ...], tuple[int, ...]]

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_DTYPE_CODES |= {torch.int32: 4, torch.int64: 5, torch.uint8: 6, torch.bool: 6}


class _Absent:
    """Stand-in for the core; `backends.resolve` never routes a call to it."""

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{name}: {_why_absent}")


_why_absent: str | None = None
try:
    import mmkernels._native as core
except ModuleNotFoundError:
    core = _Absent()  # type: ignore[assignment]
    _why_absent = why_no_core()
except ImportError as error:
    core = _Absent()  # type: ignore[assignment]
    _why_absent = f"the native core does not load: {error}"
if _why_absent is not None:
    # The build warns too, but pip hides its output.
    warnings.warn(
        f"{_why_absent}; Triton and plain PyTorch remain, and `mmkernels info` shows what runs",
        RuntimeWarning,
        stacklevel=2,
    )


def why_absent() -> str | None:
    """Why the native core cannot be used, or None when it can."""
    return _why_absent


def has_cuda() -> bool:
    """True when the core was compiled with CUDA kernels."""
    return _why_absent is None and core.build_info()["cuda_version"] is not None


def cuda_archs() -> tuple[str, ...]:
    """Compiled CUDA architectures as CMake writes them, such as ("80-real", "90a-real", "120-virtual")."""
    return tuple(core.build_info()["cuda_archs"]) if _why_absent is None else ()


def threads() -> int:
    """CPU threads for one call: torch's setting, so that the core never oversubscribes the trainer's threads."""
    return torch.get_num_threads()


def view(tensor: Tensor | None) -> View | None:
    """A tensor as the core sees it. The caller must keep the tensor alive during the call."""
    return None if tensor is None else (tensor.data_ptr(), _DTYPE_CODES[tensor.dtype], tensor.shape, tensor.stride())


def unit_stride(x: Tensor) -> Tensor:
    """The tensor with a contiguous last dimension, which every kernel requires; other strides are free."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def stream(tensor: Tensor) -> int:
    """The current CUDA stream of the tensor's device as an integer handle."""
    return torch.cuda.current_stream(tensor.device).cuda_stream
