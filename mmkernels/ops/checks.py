"""Argument checks of every family. An error names the argument, what was expected and what came."""

from __future__ import annotations

import numbers
import operator
import os
import sys
import warnings
from typing import Any, NoReturn

import torch
from torch import Tensor

__all__ = [
    "FLOATING",
    "INTEGERS",
    "deprecated",
    "deprecated_deterministic",
    "describe",
    "dtype_names",
    "expect_tensor",
    "expect_true",
    "integer",
    "is_traced",
    "narrowed",
    "not_yet",
    "readable",
    "real",
    "validating",
    "wrong_type",
    "wrong_value",
]

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def describe(value: Any) -> str:
    """A tensor as `[3, 4] int64 on cpu`; anything else as its repr."""
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {dtype_names(value.dtype)} on {value.device}"
    return f"{value!r} ({type(value).__name__})"


def dtype_names(*dtypes: torch.dtype) -> str:
    """`float32 or bfloat16`: each once."""
    return " or ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes))


def wrong_value(name: str, expected: str, got: Any) -> NoReturn:
    """Raise ValueError: `queries: expected [N, E] floating point, got [3, 4, 5] int64 on cpu`."""
    raise ValueError(f"{name}: expected {expected}, got {describe(got)}")


def wrong_type(name: str, expected: str, got: Any) -> NoReturn:
    """The same message as a TypeError."""
    raise TypeError(f"{name}: expected {expected}, got {describe(got)}")


def not_yet(name: str, got: Any) -> NoReturn:
    """Raise for an option that is not implemented yet, rather than silently ignore it."""
    raise NotImplementedError(f"{name}: not supported yet, got {describe(got)}; leave it at its default")


def deprecated(name: str, instead: str) -> None:
    """Warn about a deprecated argument at the caller's line: the first frame outside this package and torch."""
    if torch.compiler.is_compiling():
        return
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("mmkernels", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(f"{name} is deprecated: {instead}", DeprecationWarning, stacklevel=level)


def deprecated_deterministic(value: Any) -> None:
    """Check the argument `deterministic`, which has no effect, and warn about it."""
    if value is None:
        return
    if not isinstance(value, bool):
        wrong_type("deterministic", "None, True or False", value)
    deprecated("deterministic", "results are always bitwise reproducible; leave it out")


def real(name: str, value: Any, expected: str) -> float:
    """A Python or NumPy number as a float; rejects bool.

    Raises:
        TypeError: not a number.
        ValueError: an integer too large for a float.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        wrong_type(name, expected, value)
    try:
        return float(value)
    except OverflowError:
        wrong_value(name, expected, value)


def integer(name: str, value: Any, expected: str, *, at_least: int | None = None) -> int:
    """A Python or NumPy integer, or any type with `__index__`, as an int; rejects bool and float.

    Raises:
        TypeError: not an integer.
        ValueError: below `at_least`.
    """
    if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
        wrong_type(name, expected, value)
    number = value
    if not isinstance(value, (int, torch.SymInt)):
        try:
            number = operator.index(value)
        except TypeError:
            wrong_type(name, expected, value)
    if at_least is not None and number < at_least:
        wrong_value(name, expected, value)
    return number


def validating() -> bool:
    """MMKERNELS_VALIDATE=1: check values on a GPU too, which syncs. Read at every check."""
    value = os.environ.get("MMKERNELS_VALIDATE", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"MMKERNELS_VALIDATE: expected 0 or 1, got {value!r}")
    return value == "1"


def readable(tensor: Tensor) -> bool:
    """Whether a tensor's values may be read: on a CPU, and on a GPU when `validating()`.

    Never while compiling or tracing, on the meta device, or under vmap: there are no values then.
    """
    if torch.compiler.is_compiling() or is_traced(tensor):
        return False
    if tensor.device.type != "cpu" and (tensor.device.type == "meta" or not validating()):
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return False
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return True


def is_traced(tensor: Tensor) -> bool:
    """Whether a tensor is fake or a proxy, or becomes one in the next op (FakeTensorMode, make_fx, torch.export)."""
    modes = torch._C._TorchDispatchModeKey
    if any(torch._C._get_dispatch_mode(mode) is not None for mode in (modes.FAKE, modes.PROXY, modes.FUNCTIONAL)):
        return True
    fakes = sys.modules.get("torch._subclasses.fake_tensor")  # never imported: no fake tensors exist
    return torch._is_functional_tensor(tensor) or (fakes is not None and isinstance(tensor, fakes.FakeTensor))


def expect_true(holds: Tensor, message: str, got: Any = None) -> None:
    """Require every element of a bool tensor: ValueError, or a device-side assertion where reading would sync. Under
    vmap every sample must hold.
    """
    if not torch.compiler.is_compiling():
        while torch._C._functorch.is_functorch_wrapped_tensor(holds):
            holds = torch._C._functorch.get_unwrapped(holds)
    if not readable(holds):
        torch._assert_async(holds.all(), message)
    elif not bool(holds.all()):
        raise ValueError(message if got is None else f"{message}, got {describe(got)}")


def narrowed(name: str, value: Tensor, dtype: torch.dtype, *, bits: bool = False) -> Tensor:
    """Integers in a narrower dtype; users mostly pass int64.

    Args:
        name: the argument's name.
        value: integers of any dtype.
        dtype: the target dtype.
        bits: values are bit sets, so using `dtype`'s sign bit is not an overflow.

    Raises:
        ValueError: a value does not fit, if values may be read.
    """
    have, want = torch.iinfo(value.dtype), torch.iinfo(dtype)
    low, high = want.min, 2**want.bits - 1 if bits else want.max
    if (have.min < low or have.max > high) and value.numel() and readable(value):
        fits = (value >= max(low, have.min)) & (value <= min(high, have.max))  # bounds within value's own dtype
        if not bool(fits.all()):
            at = int((~fits).nonzero()[0, 0])
            raise ValueError(
                f"{name}: expected numbers that fit {dtype_names(dtype)}, got {int(value[at])} at index {at}"
            )
    return value.to(dtype)


def expect_tensor(
    name: str,
    value: Any,
    expected: str,
    *,
    ndim: int | tuple[int, ...] | None = None,
    dtypes: tuple[torch.dtype, ...] = FLOATING,
    like: Tensor | None = None,
) -> None:
    """Check a tensor argument.

    Args:
        name: the argument's name.
        value: the argument.
        expected: shape and dtype in words, such as "[N, E] floating point".
        ndim: allowed number of dimensions.
        dtypes: allowed dtypes.
        like: a tensor that must be on the same device.

    Raises:
        TypeError: not a tensor, or a wrong dtype.
        ValueError: wrong number of dimensions or device.
    """
    if not isinstance(value, Tensor):
        wrong_type(name, expected, value)
    if value.dtype not in dtypes:
        wrong_type(name, expected, value)
    allowed = (ndim,) if isinstance(ndim, int) else ndim
    if allowed is not None and value.ndim not in allowed:
        wrong_value(name, expected, value)
    if like is not None and value.device != like.device:
        wrong_value(name, f"{expected} on {like.device}", value)
