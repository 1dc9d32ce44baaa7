"""Chooses the backend of a call, and explains why the others were not chosen.

    native      the C++ core on CPU tensors, CUDA C++ on CUDA tensors
    triton      Triton on CUDA tensors, or its interpreter on CPU tensors when TRITON_INTERPRET=1
    reference   plain PyTorch, on any device

`backend=None` takes the first that supports the call. Requesting a backend that does not support it raises
BackendError, which lists every candidate and its reason.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmkernels.runtime import native

__all__ = [
    "BACKENDS",
    "FAMILIES",
    "VERIFIED_ON_GPU",
    "BackendError",
    "arch_served",
    "candidates",
    "defaults",
    "resolve",
    "sm90_wants",
]

BACKENDS = ("native", "triton", "reference")
FAMILIES = ("attention", "contrastive", "packing")

# Families whose CUDA C++ kernels have passed `pytest -m gpu`: docs/verified.md has device, versions and date.
# `backend=None` skips the others on CUDA tensors; `backend="native"` still runs them.
VERIFIED_ON_GPU: frozenset[str] = frozenset()

_COMPILER = (3, 4)  # the first Triton that compiles these kernels
_INTERPRETER = (3, 5)  # the first whose interpreter has float64 products (`ops/triton_common.py`)

_LOW = (torch.bfloat16, torch.float16)
_LOW_AND_SINGLE = (torch.float32, *_LOW)


class BackendError(RuntimeError):
    """No backend, or not the requested one, supports a call."""


_Function = TypeVar("_Function", bound=Callable[..., Any])


def _constant(function: _Function) -> _Function:
    """torch.compiler.assume_constant_result without its import of torch._dynamo, which takes 1.4 s."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def interpreting() -> bool:
    """True when Triton kernels run in the interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def arch_served(capability: tuple[int, int], archs: tuple[str, ...]) -> bool:
    """Whether code compiled for `archs` runs on a device of this compute capability.

    `90a-real` needs exactly 9.0, `80-real` any 8.x, `80-virtual` (PTX) 8.0 or later; `80` means both of the last two.
    """
    major, minor = capability
    for arch in archs:
        number, _, kind = arch.partition("-")
        wants = int(number.rstrip("af"))
        has = major * 10 + minor
        if number[-1] in "af":
            if has == wants:
                return True
            continue
        if kind != "real" and has >= wants:
            return True
        if kind != "virtual" and major == wants // 10 and has >= wants:
            return True
    return False


def _why_not_native(family: str, device: torch.device, dtype: torch.dtype) -> str | None:
    absent = native.why_absent()
    if absent is not None:
        return absent
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"no native kernels for {device.type} tensors"
    if not native.has_cuda():
        return "the native core was built without CUDA"
    if dtype not in _LOW_AND_SINGLE:
        return f"the CUDA kernels take float32, bfloat16 and float16, not {_name(dtype)}"
    capability = torch.cuda.get_device_capability(device)
    if not arch_served(capability, native.cuda_archs()):
        return f"compiled for {', '.join(native.cuda_archs())}; this device is sm_{capability[0]}{capability[1]}"
    return None


@_constant
def sm90_wants(device: torch.device, dtype: torch.dtype) -> str | None:
    """What the kernels for compute capability 9.0 (`csrc/*/*_sm90_*.cu`) need that these tensors or this build lack.

    None when the kernels run.
    """
    if dtype not in _LOW:
        return f"bfloat16 or float16, not {_name(dtype)}"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return "a device of compute capability 9.0"
    if not any(arch in ("90a", "90a-real") for arch in native.cuda_archs()):
        return "a native core compiled for 90a"
    return None


def _why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'mmkernels[triton]')"
    if dtype not in _LOW_AND_SINGLE:
        return f"the Triton kernels take float32, bfloat16 and float16, not {_name(dtype)}"
    if device.type == "cuda":
        return _why_too_old(_COMPILER, "does not compile these kernels")
    if device.type == "cpu" and interpreting():
        return _why_too_old(_INTERPRETER, "has no float64 products in its interpreter")
    if device.type == "cpu":
        return "Triton needs a CUDA tensor (or TRITON_INTERPRET=1, which is for tests)"
    return f"no Triton kernels for {device.type} tensors"


def _why_too_old(first: tuple[int, int], lacks: str) -> str | None:
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # a nightly build, under another name
        return None
    major, minor = (int(part) for part in version.split(".")[:2])
    return None if (major, minor) >= first else f"Triton {version} {lacks}: expected at least {first[0]}.{first[1]}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def candidates(family: str, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """For each backend, why it does not support tensors of this device and dtype; None if it does."""
    return {
        "native": _why_not_native(family, device, dtype),
        "triton": _why_not_triton(device, dtype),
        "reference": None,
    }


def defaults(family: str, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """Like `candidates`, plus the reasons why `backend=None` skips backends that would run."""
    found = candidates(family, device, dtype)
    return {name: why or _why_not_by_default(family, name, device) for name, why in found.items()}


def _why_not_by_default(family: str, backend: str, device: torch.device) -> str | None:
    """Why `backend=None` skips a backend that would run; None if it does not."""
    if backend == "native" and device.type == "cuda" and family not in VERIFIED_ON_GPU:
        return "not yet verified on a GPU (docs/verified.md); runs only on request"
    if backend == "triton" and device.type == "cpu":
        return "the interpreter is for tests and runs only on request"
    return None


def resolve(
    family: str,
    tensor: Tensor,
    requested: str | None = None,
    limits: Mapping[str, str | None] | None = None,
) -> str:
    """Name the backend of a call.

    Args:
        family: "attention", "contrastive" or "packing".
        tensor: any tensor of the call; its device and dtype decide.
        requested: the caller's `backend`, or None for the first that supports the call.
        limits: backend -> why it does not support this particular call (a head dim, say); absent or None: it does.

    Raises:
        ValueError: `requested` does not name a backend.
        BackendError: the requested backend does not support the call; the message lists each candidate's reason.
    """
    if requested is not None and requested not in BACKENDS:
        raise ValueError(f"backend: expected None or one of {', '.join(BACKENDS)}, got {requested!r}")
    excluded = tuple(limits.items()) if limits else ()
    return _resolve(family, tensor.device, tensor.dtype, requested, excluded)


_resolved: dict[Any, str] = {}


@_constant
def _resolve(
    family: str,
    device: torch.device,
    dtype: torch.dtype,
    requested: str | None,
    limits: tuple[tuple[str, str | None], ...],
) -> str:
    """`resolve` over hashable arguments, cached; torch.compile treats its result as a constant."""
    key = (family, device, dtype, requested, limits)
    if key not in _resolved:
        _resolved[key] = _choose(*key)
    return _resolved[key]


def _choose(
    family: str,
    device: torch.device,
    dtype: torch.dtype,
    requested: str | None,
    limits: tuple[tuple[str, str | None], ...],
) -> str:
    beyond = dict(limits)
    reasons = {name: why or beyond.get(name) for name, why in candidates(family, device, dtype).items()}
    if requested is not None:
        if reasons[requested] is None:
            return requested
        raise BackendError(_explain(f"{family}: backend={requested!r} does not support this call", reasons))
    reasons = {name: why or _why_not_by_default(family, name, device) for name, why in reasons.items()}
    for name, reason in reasons.items():
        if reason is None:
            return name
    raise BackendError(_explain(f"{family}: no backend supports this call", reasons))


def _explain(headline: str, reasons: Mapping[str, str | None]) -> str:
    return "\n".join([headline, *(f"  {name}: {reason or 'supported'}" for name, reason in reasons.items())])
