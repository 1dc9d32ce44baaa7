"""The accuracy comparison: error against float64 truth, relative to plain PyTorch's error in the same dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmkernels.ops.dtypes import compute_dtype

__all__ = ["Accuracy", "assert_as_accurate"]

# Absolute slack, because plain PyTorch's error may happen to be 0. The rms error may be a few float32 roundings
# whatever the dtype (accumulation is float32), the worst error one rounding of its own dtype. Where terms cancel, any
# summation order may err by a rounding of the terms, however small the result.
_RMS_EPSILON = 2e-6
_RMS_EPSILON_F64 = 1e-14


@dataclass(frozen=True)
class Accuracy:
    """Errors against float64 truth (rms and worst), plain PyTorch's, and the magnitude of the truth."""

    rms: float
    worst: float
    plain_rms: float
    plain_worst: float
    truth_rms: float
    truth_worst: float

    @property
    def ratio(self) -> float:
        """Our rms error over plain PyTorch's."""
        return self.rms / self.plain_rms if self.plain_rms > 0 else (0.0 if self.rms == 0 else float("inf"))


def _norms(x: Tensor, tail: float = 0.0) -> tuple[float, float]:
    """The rms, and the mean of the largest entries, a share `tail` of all and at least one."""
    if x.numel() == 0:
        return 0.0, 0.0
    worst = x.abs().flatten().topk(max(1, round(tail * x.numel()))).values.mean()
    return x.square().mean().sqrt().item(), worst.item()


def measure(actual: Tensor, plain: Tensor, truth: Tensor, tail: float = 0.0) -> Accuracy:
    """Errors of `actual` and `plain` against `truth` (float64). Entries that are infinite in the truth must agree."""
    assert truth.dtype == torch.float64, truth.dtype
    assert actual.shape == truth.shape == plain.shape, (actual.shape, plain.shape, truth.shape)
    finite = torch.isfinite(truth)
    assert torch.equal(actual[~finite].double(), truth[~finite]), "result differs where the truth is infinite"
    rms, worst = _norms(actual[finite].double() - truth[finite], tail)
    judged = finite & torch.isfinite(plain)  # entries where plain PyTorch overflows give no reference error
    plain_rms, plain_worst = _norms(plain[judged].double() - truth[judged], tail)
    return Accuracy(rms, worst, plain_rms, plain_worst, *_norms(truth[finite], tail))


def assert_as_accurate(
    what: str,
    actual: Tensor,
    plain: Tensor,
    truth: Tensor,
    *,
    factor: float = 1.2,
    terms: Tensor | None = None,
    tail: float = 0.0,
) -> Accuracy:
    """Assert that a result's error is at most `factor` times plain PyTorch's in the same dtype, plus an epsilon.

    Args:
        what: names the tensor in the message.
        actual: the kernel's result.
        plain: plain PyTorch's result on the same low-precision input.
        truth: the float64 result on the same input, upcast.
        factor: allowed ratio; this package's tests pass at most 1.2.
        terms: truth's shape; for results that cancel, the sum of each entry's absolute terms. One rounding of it
            (float32; float64 for float64) is allowed in addition.
        tail: judges as the worst error the mean of this share of the largest ones. Where the errors of a few rows
            dominate, which of two equally good results has the single largest is chance.

    Returns:
        The errors, for benches to print.

    Raises:
        AssertionError: a NaN, a missed infinity, or a larger error; the message has the figures.
    """
    assert not torch.isnan(actual).any(), f"{what}: NaN"
    accuracy = measure(actual, plain, truth, tail)
    rms_epsilon = _RMS_EPSILON_F64 if actual.dtype == torch.float64 else _RMS_EPSILON
    allowed_rms = factor * accuracy.plain_rms + rms_epsilon * accuracy.truth_rms
    allowed_worst = factor * accuracy.plain_worst + torch.finfo(actual.dtype).eps * accuracy.truth_worst
    if terms is not None:
        rounding = torch.finfo(compute_dtype(actual.dtype)).eps
        terms_rms, terms_worst = _norms(terms, tail)
        allowed_rms, allowed_worst = allowed_rms + rounding * terms_rms, allowed_worst + rounding * terms_worst
    assert accuracy.rms <= allowed_rms, f"{what}: rms error {accuracy.rms:.3e} > {allowed_rms:.3e}; {accuracy}"
    assert accuracy.worst <= allowed_worst, (
        f"{what}: worst error {accuracy.worst:.3e} > {allowed_worst:.3e}; {accuracy}"
    )
    return accuracy
