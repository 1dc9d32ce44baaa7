"""Options of the ahead-of-time gate."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pairs", action="store_true", help="Triton: only enough cases that every two options meet")
