"""Run tests on each instruction set that the native core has and this processor supports, but for the one in use, on
which all other tests run.

    @isas.each
    def test_each_instruction_set(isa):
        isas.run_on(isa, check)             # check() in its own process: a process chooses its set once

No other file chooses sets, so none asks for a set that is compiled in but that this processor lacks.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mmkernels.runtime import native

__all__ = ["each", "run_on", "usable"]


def usable() -> list[str]:
    """Compiled in and supported by this processor; narrowest first."""
    return [] if native.why_absent() is not None else native.core.build_info()["usable_cpu_isas"]


def _parameters() -> list:
    reason = native.why_absent() or "this processor has no instruction set but the one in use"
    others = [isa for isa in usable() if isa != native.core.build_info()["cpu_isa"]]
    return others or [pytest.param("none", marks=pytest.mark.skip(reason=reason))]


def each(test: Callable) -> Callable:
    return pytest.mark.isa(pytest.mark.parametrize("isa", _parameters())(test))


def run_on(isa: str, check: Callable[[], None]) -> None:
    """Call a function of a test file in a process whose CPU kernels are compiled for `isa`."""
    file = Path(check.__code__.co_filename)
    folders = [str(file.parent), str(Path(__file__).parent)]
    code = f"""
import sys
sys.path[:0] = {folders!r}
from mmkernels.runtime import native
assert native.core.build_info()["cpu_isa"] == {isa!r}
import {file.stem}
{file.stem}.{check.__name__}()
"""
    environment = {**os.environ, "MMKERNELS_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
