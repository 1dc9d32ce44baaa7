"""Test cases in which every two values of every two arguments meet: far fewer than all combinations.

    @pairwise.cases(mask=MASKS, dtype=DTYPES, heads=(1, 4))
    def test_masks(mask, dtype, heads): ...

`mmkernels.testing.pairs` says why. Do not pass what selects another kernel, such as a backend or a device: parametrize
it separately, so that each kernel meets every pair. The choice depends on the values only, so it is the same in every
process and on every machine.
"""

from collections.abc import Callable, Collection
from itertools import product
from typing import Any

import pytest
import torch

from mmkernels.testing.pairs import covering

__all__ = ["cases"]


def cases(only: Callable[..., bool] = lambda **_: True, **values: Collection[Any]) -> pytest.MarkDecorator:
    """Parametrize a test over values of its arguments; `only` says whether a combination may be chosen."""
    names = tuple(values)
    allowed = [case for case in product(*values.values()) if only(**dict(zip(names, case, strict=True)))]
    for place, name in enumerate(names):
        gone = [value for value in values[name] if value not in {case[place] for case in allowed}]
        assert not gone, f"{name}: no case may have {gone}"
    chosen = [allowed[i] for i in covering(allowed)]
    return pytest.mark.parametrize(names, [pytest.param(*case, id="-".join(map(_name, case))) for case in chosen])


def _name(value: Any) -> str:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else str(value)
