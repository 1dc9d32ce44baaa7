"""How every family says what is wrong with an argument: its name, what was expected, what came."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

__all__ = ["FLOATING", "describe", "expect_tensor", "not_yet", "wrong_type", "wrong_value"]

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(value: Any) -> str:
    """A tensor as `[3, 4] int64 on cpu`; anything else as its repr."""
    if isinstance(value, torch.Tensor):
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


def expect_tensor(
    name: str,
    value: Any,
    expected: str,
    *,
    ndim: int | tuple[int, ...] | None = None,
    dtypes: tuple[torch.dtype, ...] = FLOATING,
    like: torch.Tensor | None = None,
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
    if not isinstance(value, torch.Tensor):
        wrong_type(name, expected, value)
    if value.dtype not in dtypes:
        wrong_type(name, expected, value)
    allowed = (ndim,) if isinstance(ndim, int) else ndim
    if allowed is not None and value.ndim not in allowed:
        wrong_value(name, expected, value)
    if like is not None and value.device != like.device:
        wrong_value(name, f"{expected} on {like.device}", value)
