"""The choice of cases: every allowed pair, no others, and few cases."""

from collections import Counter
from itertools import combinations, product

import pairwise
import pytest


def chosen(**arguments) -> list[tuple]:
    return [parameters.values for parameters in pairwise.cases(**arguments).args[1]]


def test_every_pair_is_met_in_few_cases() -> None:
    values = {"a": range(7), "b": "wxyz", "c": (1.0, 2.0, 3.0, 4.0), "d": (False, True)}
    found = chosen(**values)
    for (i, first), (j, second) in combinations(enumerate(values.values()), 2):
        assert {(case[i], case[j]) for case in found} == set(product(first, second))
    assert 7 * 4 <= len(found) <= 7 * 4 + 4
    assert found == chosen(**values)


def test_what_is_not_allowed_is_not_chosen() -> None:
    found = chosen(only=lambda a, b, c: not (a == 1 and c == "z"), a=range(4), b=range(3), c="xyz")
    assert (1, "z") not in {(case[0], case[2]) for case in found}
    assert {(case[0], case[2]) for case in found} == set(product(range(4), "xyz")) - {(1, "z")}


def test_names_are_those_of_the_values() -> None:
    import torch

    marks = pairwise.cases(dtype=(torch.float32,), mask=("dense",)).args[1]
    assert [parameters.id for parameters in marks] == ["float32-dense"]


def test_one_argument_takes_each_of_its_values_in_turn() -> None:
    assert chosen(a="xy") == [("x",), ("y",)]


def test_no_value_keeps_to_few_others() -> None:
    """Beyond the required pairs, cases are spread evenly."""
    found = chosen(a=range(21), b="xyz", c=(False, True))
    meetings = Counter((b, c) for _, b, c in found)
    assert max(meetings.values()) - min(meetings.values()) <= 1


def test_a_value_that_no_case_may_have_is_an_error() -> None:
    with pytest.raises(AssertionError, match=r"a: no case may have \[2\]"):
        chosen(only=lambda a, b: a < 2, a=range(3), b="xy")
