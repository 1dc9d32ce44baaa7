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

# The worst error is the mean over this share of the entries. The single largest is chance: of two results with the same
# distribution of errors, such as two orders of summation, one often has twice the other's, and which one depends on how
# the processor's library sums. It has a bound of its own, against an entry that is wrong.
_TAIL = 1e-3
_LARGEST = 2.5


@dataclass(frozen=True)
class Accuracy:
    """Errors against float64 truth, plain PyTorch's, and the magnitude of the truth: each the root mean square, the
    mean of the largest thousandth of the entries (at least one), and the largest."""

    rms: float
    worst: float
    largest: float
    plain_rms: float
    plain_worst: float
    plain_largest: float
    truth_rms: float
    truth_worst: float
    truth_largest: float

    @property
    def ratio(self) -> float:
        """Our rms error over plain PyTorch's."""
        return self.rms / self.plain_rms if self.plain_rms > 0 else (0.0 if self.rms == 0 else float("inf"))


def _norms(x: Tensor) -> tuple[float, float, float]:
    if x.numel() == 0:
        return 0.0, 0.0, 0.0
    worst = x.abs().flatten().topk(max(1, round(_TAIL * x.numel()))).values
    return x.square().mean().sqrt().item(), worst.mean().item(), worst[0].item()


def measure(actual: Tensor, plain: Tensor, truth: Tensor) -> Accuracy:
    """Errors of `actual` and `plain` against `truth` (float64). Entries that are infinite in the truth must agree."""
    assert truth.dtype == torch.float64, truth.dtype
    assert actual.shape == truth.shape == plain.shape, (actual.shape, plain.shape, truth.shape)
    finite = torch.isfinite(truth)
    assert torch.equal(actual[~finite].double(), truth[~finite]), "result differs where the truth is infinite"
    ours = _norms(actual[finite].double() - truth[finite])
    judged = finite & torch.isfinite(plain)  # entries where plain PyTorch overflows give no reference error
    return Accuracy(*ours, *_norms(plain[judged].double() - truth[judged]), *_norms(truth[finite]))


def assert_as_accurate(
    what: str,
    actual: Tensor,
    plain: Tensor,
    truth: Tensor,
    *,
    factor: float = 1.2,
    terms: Tensor | None = None,
) -> Accuracy:
    """Assert that a result's error, rms and worst, is at most `factor` times plain PyTorch's in the same dtype, plus an
    epsilon. The worst error is the mean over a thousandth of the entries; the single largest may be 2.5 times that.

    Args:
        what: names the tensor in the message.
        actual: the kernel's result.
        plain: plain PyTorch's result on the same low-precision input.
        truth: the float64 result on the same input, upcast.
        factor: allowed ratio; this package's tests pass at most 1.2.
        terms: truth's shape; for results that cancel, the sum of each entry's absolute terms. One rounding of it
            (float32; float64 for float64) is allowed in addition.

    Returns:
        The errors, for benches to print.

    Raises:
        AssertionError: a NaN, a missed infinity, or a larger error; the message has the figures.
    """
    assert not torch.isnan(actual).any(), f"{what}: NaN"
    accuracy = measure(actual, plain, truth)
    rounding = torch.finfo(compute_dtype(actual.dtype)).eps
    rms_terms, worst_terms, largest_terms = (
        rounding * x for x in _norms(terms if terms is not None else truth.new_empty(0))
    )
    rms_epsilon = _RMS_EPSILON_F64 if actual.dtype == torch.float64 else _RMS_EPSILON
    epsilon, a = torch.finfo(actual.dtype).eps, accuracy
    for name, error, allowed in (
        ("rms", a.rms, factor * a.plain_rms + rms_epsilon * a.truth_rms + rms_terms),
        ("worst", a.worst, factor * a.plain_worst + epsilon * a.truth_worst + worst_terms),
        ("largest", a.largest, _LARGEST * factor * a.plain_largest + epsilon * a.truth_largest + largest_terms),
    ):
        assert error <= allowed, f"{what}: {name} error {error:.3e} > {allowed:.3e}; {accuracy}"
    return accuracy
