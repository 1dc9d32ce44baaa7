"""Loops over cases whose failures name the case.

for mode in MODES:
    with named.case(mode):
        assert ...

named.mistakes((lambda: infonce(x, None, 1.0), TypeError, "keys: expected .*got None"), ...)
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["case", "mistakes"]


@contextmanager
def case(*what: object) -> Iterator[None]:
    """An assertion that fails inside names the case."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{', '.join(map(str, what))}: {error}") from error


def mistakes(*table: tuple[Callable[[], Any], type[Exception], str]) -> None:
    """Each call must raise its error with a message that matches its pattern; those that do not are listed together."""
    assert table
    wrong = []
    for call, expected, pattern in table:
        try:
            call()
        except Exception as error:
            if not isinstance(error, expected) or not re.search(pattern, str(error)):
                wrong.append(f"{pattern}\n  raised {type(error).__name__}: {error}")
        else:
            wrong.append(f"{pattern}\n  raised nothing")
    assert not wrong, "\n".join(wrong)
