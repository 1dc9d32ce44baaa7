"""A failure in a loop names its case."""

import named
import pytest


def test_a_failure_names_its_case() -> None:
    with pytest.raises(AssertionError, match="mean, 300: 1 is not 2"), named.case("mean", 300):
        raise AssertionError("1 is not 2")


def test_mistakes_are_all_listed() -> None:
    def raises(error: Exception) -> None:
        raise error

    right = (lambda: raises(TypeError("x: expected a tensor")), TypeError, "x: expected")
    named.mistakes(right)
    wrong = [
        (lambda: None, TypeError, "y: expected"),
        (right[0], ValueError, "x: expected"),
        (*right[:2], "z: expected"),
    ]
    with pytest.raises(AssertionError) as failure:
        named.mistakes(right, *wrong)
    assert str(failure.value).splitlines() == [
        "y: expected",
        "  raised nothing",
        "x: expected",
        "  raised TypeError: x: expected a tensor",
        "z: expected",
        "  raised TypeError: x: expected a tensor",
    ]
