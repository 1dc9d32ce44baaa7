"""Test cases in which every two values of every two arguments meet: far fewer than all combinations.

    @pairwise.cases(mask=MASKS, dtype=DTYPES, heads=(1, 4))
    def test_masks(mask, dtype, heads): ...

Most faults need one value of one argument, or two values of two; a pairwise choice finds those like the full product
(Kuhn, Wallace, Gallo: Software fault interactions and implications for software testing, 2004). Do not pass what
selects another kernel, such as a backend or a device: parametrize it separately, so that each kernel meets every pair.
The choice depends on the values only, so it is the same in every process and on every machine.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from itertools import combinations_with_replacement, product
from typing import Any

import pytest
import torch

__all__ = ["cases"]

Case = tuple[Any, ...]


def cases(only: Callable[..., bool] = lambda **_: True, **values: Collection[Any]) -> pytest.MarkDecorator:
    """Parametrize a test over values of its arguments; `only` says whether a combination may be chosen."""
    names = tuple(values)
    allowed = [case for case in product(*values.values()) if only(**dict(zip(names, case, strict=True)))]
    for place, name in enumerate(names):
        gone = [value for value in values[name] if value not in {case[place] for case in allowed}]
        assert not gone, f"{name}: no case may have {gone}"
    chosen = [pytest.param(*case, id="-".join(map(_name, case))) for case in _cover(allowed)]
    return pytest.mark.parametrize(names, chosen)


def _cover(allowed: list[Case]) -> Iterator[Case]:
    """Greedy: take the case with the most unmet pairs; among equals the one whose pairs were met least, so that no
    value always meets the same few others."""
    pairs = {
        case: {(i, j, case[i], case[j]) for i, j in combinations_with_replacement(range(len(case)), 2)}
        for case in allowed
    }
    missing, met = set().union(*pairs.values()), Counter()
    while missing:
        best = max(allowed, key=lambda case: (len(pairs[case] & missing), -sum(met[pair] for pair in pairs[case])))
        missing -= pairs[best]
        met.update(pairs[best])
        yield best


def _name(value: Any) -> str:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else str(value)
