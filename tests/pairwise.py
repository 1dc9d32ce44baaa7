"""Cases in which every two arguments meet in every two of their values: far fewer than all combinations.

    @pairwise.cases(mask=MASKS, dtype=DTYPES, heads=(1, 4))
    def test_masks(mask, dtype, heads): ...

Most faults need one value of one argument, or two of two; those a pairwise choice finds as the full product would
(Kuhn, Wallace, Gallo: Software fault interactions and implications for software testing, 2004). What selects another
kernel altogether, as a backend or a device does, is no argument of this: parametrize it apart, so that each kernel
meets every pair. The choice is a function of the values alone, thus the same in every process and on every machine.
"""

from collections.abc import Callable, Collection, Iterator
from itertools import combinations_with_replacement, product
from typing import Any

import pytest
import torch

__all__ = ["cases"]

Case = tuple[Any, ...]


def cases(only: Callable[..., bool] = lambda **_: True, **values: Collection[Any]) -> pytest.MarkDecorator:
    """Parametrize a test by values of its arguments; `only` says of a combination whether it may be chosen at all."""
    names = tuple(values)
    allowed = [case for case in product(*values.values()) if only(**dict(zip(names, case, strict=True)))]
    chosen = [pytest.param(*case, id="-".join(map(_name, case))) for case in _cover(allowed)]
    return pytest.mark.parametrize(names, chosen)


def _cover(allowed: list[Case]) -> Iterator[Case]:
    """Greedily: the case that has the most pairs not met so far, the first of equals."""
    pairs = {
        case: {(i, j, case[i], case[j]) for i, j in combinations_with_replacement(range(len(case)), 2)}
        for case in allowed
    }
    missing = set().union(*pairs.values())
    while missing:
        best = max(allowed, key=lambda case: len(pairs[case] & missing))
        missing -= pairs[best]
        yield best


def _name(value: Any) -> str:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else str(value)
