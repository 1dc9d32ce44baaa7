"""How every family checks its arguments and says what is wrong with one: its name, what was expected, what came."""

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
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"
    return f"{value!r} ({type(value).__name__})"


def wrong_value(name: str, expected: str, got: Any) -> NoReturn:
    """Raise ValueError: `queries: expected [N, E] floating point, got [3, 4, 5] int64 on cpu`."""
    raise ValueError(f"{name}: expected {expected}, got {describe(got)}")


def wrong_type(name: str, expected: str, got: Any) -> NoReturn:
    """Raise TypeError in the same words."""
    raise TypeError(f"{name}: expected {expected}, got {describe(got)}")


def not_yet(name: str, got: Any) -> NoReturn:
    """Raise for a part of the contract that is not there yet: accepted and ignored would be worse."""
    raise NotImplementedError(f"{name}: not supported yet, got {describe(got)}; leave it at its default")


def deprecated(name: str, instead: str) -> None:
    """Warn of an argument that will go, at the line outside this package (and outside torch) that gives it."""
    if torch.compiler.is_compiling():
        return
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("mmkernels", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(f"{name} is deprecated: {instead}", DeprecationWarning, stacklevel=level)


def deprecated_deterministic(value: Any) -> None:
    """The argument `deterministic`, in which there is nothing to choose."""
    if value is None:
        return
    if not isinstance(value, bool):
        wrong_type("deterministic", "None, True or False", value)
    deprecated("deterministic", "results are always bitwise reproducible; leave it out")


def real(name: str, value: Any, expected: str) -> float:
    """A number, Python's or NumPy's, as a float; a bool is none.

    Raises:
        TypeError: not a number.
        ValueError: an integer beyond all floats.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        wrong_type(name, expected, value)
    try:
        return float(value)
    except OverflowError:
        wrong_value(name, expected, value)


def integer(name: str, value: Any, expected: str, *, at_least: int | None = None) -> int:
    """An integer, Python's or NumPy's or of any type with `__index__`, as an int; a bool is none, a float neither.

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
    """MMKERNELS_VALIDATE=1: values are checked on a GPU too, which waits for the device. Read anew at each check."""
    value = os.environ.get("MMKERNELS_VALIDATE", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"MMKERNELS_VALIDATE: expected 0 or 1, got {value!r}")
    return value == "1"


def readable(tensor: Tensor) -> bool:
    """Whether the values of a tensor may be looked at: on a CPU, and on a GPU when `validating()`.

    Never where there are none to read: while compiling or tracing, on the meta device, and under vmap.
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
    """Whether a tensor is fake or a proxy, or will be by the next operation (FakeTensorMode, make_fx, torch.export)."""
    modes = torch._C._TorchDispatchModeKey
    if any(torch._C._get_dispatch_mode(mode) is not None for mode in (modes.FAKE, modes.PROXY, modes.FUNCTIONAL)):
        return True
    fakes = sys.modules.get("torch._subclasses.fake_tensor")  # not imported: then there is none
    return torch._is_functional_tensor(tensor) or (fakes is not None and isinstance(tensor, fakes.FakeTensor))


def expect_true(holds: Tensor, message: str, got: Any = None) -> None:
    """A condition on values, of any shape: ValueError with what came, or where it cannot be read without waiting, an
    assertion on the device. Under vmap it must hold for every sample.
    """
    if not torch.compiler.is_compiling():
        while torch._C._functorch.is_functorch_wrapped_tensor(holds):
            holds = torch._C._functorch.get_unwrapped(holds)
    if not readable(holds):
        torch._assert_async(holds.all(), message)
    elif not bool(holds.all()):
        raise ValueError(message if got is None else f"{message}, got {describe(got)}")


def narrowed(name: str, value: Tensor, dtype: torch.dtype, *, bits: bool = False) -> Tensor:
    """Integers in a narrower type, which torch's own int64 mostly fits into.

    Args:
        name: the argument's name.
        value: any integers.
        dtype: what they become.
        bits: each is a set of bits, so that one that is set in `dtype`'s sign is no overflow.

    Raises:
        ValueError: one does not fit, where values may be read.
    """
    have, want = torch.iinfo(value.dtype), torch.iinfo(dtype)
    low, high = want.min, 2**want.bits - 1 if bits else want.max
    if (have.min < low or have.max > high) and value.numel() and readable(value):
        fits = (value >= max(low, have.min)) & (value <= min(high, have.max))  # within what its own dtype can say
        if not bool(fits.all()):
            at = int((~fits).nonzero()[0, 0])
            kind = str(dtype).removeprefix("torch.")
            raise ValueError(f"{name}: expected numbers that fit {kind}, got {int(value[at])} at index {at}")
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
        name: the argument's name, as the user wrote it.
        value: what came.
        expected: shape and dtype in words, such as "[N, E] floating point".
        ndim: allowed number of dimensions.
        dtypes: allowed dtypes.
        like: a tensor whose device must be the same.

    Raises:
        TypeError: not a tensor, or a dtype that is not allowed.
        ValueError: wrong number of dimensions, or another device.
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
