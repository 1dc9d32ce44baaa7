"""Save objects with NumPy arrays by `torch.save`; by default `torch.load` reads no NumPy arrays."""

from __future__ import annotations

import copyreg
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Saved"]

_TORCH_SAVE = 2  # the pickle protocol that torch.save writes, and the only one that torch.load reads by default


class Saved:
    """A frozen class of arrays and plain values: a file stores arrays as tensors and loads them as arrays.

    Other processes and copies get the arrays themselves: a tensor would be sent as a handle to the sender's memory,
    which may be gone before it is opened.
    """

    def __init_subclass__(cls) -> None:
        torch.serialization.add_safe_globals([cls])

    def __reduce_ex__(self, protocol: Any) -> Any:
        if protocol > _TORCH_SAVE:
            return super().__reduce_ex__(protocol)
        state = {name: _as_tensors(value) for name, value in self.__dict__.items()}
        return copyreg.__newobj__, (type(self),), state  # type: ignore[attr-defined]

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            array = value.numpy() if isinstance(value, Tensor) else value
            if isinstance(array, np.ndarray):
                array.flags.writeable = False
            self.__dict__[name] = array


def _as_tensors(value: Any) -> Any:
    """The value in types that `torch.load` reads."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple)):
        return type(value)(_as_tensors(item) for item in value)
    return value
