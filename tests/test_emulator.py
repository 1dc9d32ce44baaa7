"""The emulator of CUDA's asynchronous machinery: a correct kernel passes, and each mistake is detected."""

import re
import sys
from pathlib import Path

import pytest
import torch

NATIVE = Path(__file__).parent / "native"
sys.path.insert(0, str(NATIVE))

import emulation  # noqa: E402

pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason="the emulator needs a C++ compiler")

_ENUM = re.search(r"enum Mistake : int \{(.*?)\}", (NATIVE / "sm90_probe.h").read_text(encoding="utf-8"), re.S)
MISTAKES = [name.strip() for name in _ENUM[1].split(",")][:-1]
SEEDS = range(12)


@pytest.fixture(scope="module")
def module():
    return emulation.build("sm90_probe", [*emulation.MACHINE, NATIVE / "sm90_probe.cpp"])


def error_of(module, mistake: int, seed: int) -> str | None:
    """What is wrong with a run, or None."""
    generator = torch.Generator().manual_seed(seed)
    a, b, v = (torch.randn(64, n, generator=generator).bfloat16() for n in (256, 256, 64))
    out = torch.full((64, 64), torch.nan, dtype=torch.bfloat16)
    try:
        module.probe(mistake, seed, a.data_ptr(), b.data_ptr(), v.data_ptr(), out.data_ptr())
    except RuntimeError as error:
        return str(error)
    scores = (a.double() @ b.double().T).float().bfloat16()
    expected = scores.double() @ v.double()
    error = (out.double() - expected).norm() / expected.norm()
    return None if error < 2**-8 else f"relative error {error}"


def test_the_kernel_is_right_under_every_schedule(module) -> None:
    assert module.mistakes == len(MISTAKES) and MISTAKES[0] == "none"
    assert [error_of(module, 0, seed) for seed in SEEDS] == [None] * len(SEEDS)


@pytest.mark.parametrize("mistake", range(1, len(MISTAKES)), ids=lambda i: MISTAKES[i])
def test_a_mistake_shows(module, mistake) -> None:
    assert any(error_of(module, mistake, seed) for seed in SEEDS)
