"""segment_pool's sum, mean, max and first on every backend: exact where nothing is added, otherwise against float64."""

import itertools

import backends
import pytest
import torch
from ops.packing.segments import SEGMENTS, with_gradients
from torch import Tensor

from mmkernels.ops.packing import segment_pool
from mmkernels.testing import assert_as_accurate
from mmkernels.testing.packing import cu_seqlens_of

WIDTHS = (1, 37, 300)


def plain_pool(x: Tensor, lengths: list[int], mode: str) -> Tensor:
    """What a user would write: one segment at a time."""
    parts = x[: sum(lengths)].split(lengths) if lengths else []
    rows = []
    for part in parts:
        if len(part) == 0:
            rows.append(part.sum(0))
        elif mode == "max":
            rows.append(part.max(0).values)
        else:
            rows.append({"sum": part.sum(0), "mean": part.mean(0), "first": part[0]}[mode])
    return torch.stack(rows) if rows else x[:0]


def inputs_of(segments, width, dtype, backend, device) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """(lengths, cu_seqlens, x, gradient of the output)."""
    lengths, left_over = SEGMENTS[segments]
    if backends.interpreted(backend, device):
        lengths = [min(length, 300) for length in lengths]
    x = torch.randn(sum(lengths) + left_over, width, device=device).to(dtype)
    grad = torch.randn(len(lengths), width, device=device).to(dtype)
    return lengths, cu_seqlens_of(lengths, device), x, grad


@backends.every_device
@backends.every
@backends.every_dtype
def test_sum_and_mean(dtype, backend, device):
    backends.need("packing", backend, dtype, device)
    for mode, segments, width in itertools.product(("sum", "mean"), SEGMENTS, WIDTHS):
        lengths, cu, x, grad = inputs_of(segments, width, dtype, backend, device)
        ours = with_gradients(lambda x, m=mode, cu=cu: segment_pool(x, cu, m, backend=backend), grad, x)
        plain, truth = (
            with_gradients(lambda x, m=mode, n=lengths: plain_pool(x, n, m), grad.to(of), x.to(of))
            for of in (dtype, torch.float64)
        )
        assert ours[0].dtype == dtype
        for what, *three in zip(("out", "grad_x"), ours, plain, truth, strict=True):
            assert_as_accurate(f"{mode} {segments} {width}: {what}", *three)


@backends.every_device
@backends.every
@backends.every_dtype
def test_max_and_first(dtype, backend, device):
    backends.need("packing", backend, dtype, device)
    for mode, segments, width in itertools.product(("max", "first"), SEGMENTS, WIDTHS):
        lengths, cu, x, grad = inputs_of(segments, width, dtype, backend, device)
        out, gradient = with_gradients(lambda x, m=mode, cu=cu: segment_pool(x, cu, m, backend=backend), grad, x)
        plain, plain_gradient = with_gradients(lambda x, m=mode, n=lengths: plain_pool(x, n, m), grad, x)
        where = f"{mode} {segments} {width}"
        assert out.dtype == dtype
        assert torch.equal(out, plain), where
        if mode == "max" and dtype in (torch.bfloat16, torch.float16):
            # Equal values are common here: PyTorch gives their gradient to any one of them, the ops to the first.
            plain_gradient = gradient_of_max(x, lengths, grad)
        assert torch.equal(gradient, plain_gradient), where


def gradient_of_max(x: Tensor, lengths: list[int], grad: Tensor) -> Tensor:
    """The gradient of each segment's maximum, to the first row that has it (argmax takes the first of equals)."""
    gradient, begin = torch.zeros_like(x), 0
    for s, length in enumerate(lengths):
        if length:
            rows = x[begin : begin + length]
            first = (rows == rows.max(0).values).to(torch.uint8).argmax(0)
            gradient[begin : begin + length].scatter_(0, first[None], grad[s][None])
        begin += length
    return gradient


@backends.every_device
@backends.every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_max_gives_its_gradient_to_the_first_of_equals(dtype, backend, device):
    backends.need("packing", backend, dtype, device)
    lengths = [300, 0, 1500, 5]
    x = torch.randint(0, 4, (sum(lengths), 9), device=device).to(dtype)
    grad = torch.arange(1, 37, device=device).reshape(4, 9).to(dtype)
    cu_seqlens = cu_seqlens_of(lengths, device)
    out, gradient = with_gradients(lambda x: segment_pool(x, cu_seqlens, "max", backend=backend), grad, x)
    assert torch.equal(gradient, gradient_of_max(x, lengths, grad))
    assert out[1].count_nonzero() == 0


@backends.every_device
@backends.every
def test_max_of_nan_and_infinities(backend, device):
    backends.need("packing", backend, device=device)
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([[1.0, -inf], [nan, -inf], [3.0, 2.0], [-inf, inf], [-inf, nan], [nan, nan]], device=device)
    cu_seqlens = cu_seqlens_of([3, 1, 2], device)
    grad = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], device=device)
    out, gradient = with_gradients(lambda x: segment_pool(x, cu_seqlens, "max", backend=backend), grad, x)
    expected = torch.tensor([[nan, 2.0], [-inf, inf], [nan, nan]], device=device)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    assert gradient.tolist() == [[0, 0], [1, 0], [0, 2], [3, 4], [0, 6], [5, 0]]


@backends.every_dtype
def test_the_last_of_many_rows_is_nan(dtype):
    """In every lane of a vector, and behind the last whole vector."""
    backends.need("packing", "native", dtype)
    x = torch.randn(40, 45).to(dtype)
    for column in (0, 7, 31, 44):
        x[39, column] = torch.nan
    out = segment_pool(x, cu_seqlens_of([40]), "max", backend="native")[0]
    assert out.isnan().nonzero().flatten().tolist() == [0, 7, 31, 44]
    assert torch.equal(out[~out.isnan()], x[:, ~out.isnan()].max(0).values)
