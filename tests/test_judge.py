"""The comparison of errors: it fails where a result is worse than plain PyTorch's, and only there."""

import pytest
import torch
from torch import Tensor

from mmkernels.testing import assert_as_accurate

SIZE = 100_000


def draw() -> tuple[Tensor, Tensor]:
    """The truth, and errors of a result, of which a few are much larger than the others."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(SIZE, dtype=torch.float64, generator=generator)
    error = 1e-5 * torch.randn(SIZE, dtype=torch.float64, generator=generator)
    error[: SIZE // 1000] *= 10 * torch.rand(SIZE // 1000, dtype=torch.float64, generator=generator)
    return truth, error


def judge(truth: Tensor, ours: Tensor, plain: Tensor) -> None:
    assert_as_accurate("it", (truth + ours).float(), (truth + plain).float(), truth)


def test_the_same_errors_in_another_place_pass() -> None:
    truth, error = draw()
    judge(truth, error.flip(0), error)


@pytest.mark.parametrize(("name", "part", "factor"), [("rms", SIZE, 1.6), ("worst", SIZE // 1000, 1.6)])
def test_larger_errors_fail(name: str, part: int, factor: float) -> None:
    truth, error = draw()
    ours = error.clone()
    ours[:part] *= factor
    with pytest.raises(AssertionError, match=f"it: {name} error"):
        judge(truth, ours, error)


def test_one_wrong_entry_fails() -> None:
    truth, error = draw()
    ours = error.clone()
    ours[0] = 3.2 * error.abs().max()
    with pytest.raises(AssertionError, match="it: largest error"):
        judge(truth, ours, error)


def test_nan_and_a_missed_infinity_fail() -> None:
    truth, error = draw()
    with pytest.raises(AssertionError, match="it: NaN"):
        judge(truth, torch.full_like(error, torch.nan), error)
    actual = (truth + error).float()
    with pytest.raises(AssertionError, match="truth is infinite"):
        assert_as_accurate("it", actual, actual, truth.index_fill(0, torch.tensor(3), torch.inf))


def test_cancelling_terms_allow_one_rounding_of_them() -> None:
    truth, plain = torch.zeros(10, dtype=torch.float64), torch.zeros(10)
    actual, terms = torch.full((10,), 1e-6), torch.full((10,), 10.0, dtype=torch.float64)
    assert_as_accurate("it", actual, plain, truth, terms=terms)
    with pytest.raises(AssertionError, match="it: rms error"):
        assert_as_accurate("it", actual, plain, truth, terms=terms / 20)


def test_scalars_and_empty_tensors() -> None:
    for x in (torch.tensor(2.0), torch.zeros(0)):
        assert assert_as_accurate("it", x, x, x.double()).ratio == 0.0
