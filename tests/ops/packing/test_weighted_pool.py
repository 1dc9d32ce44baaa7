"""segment_pool(mode="weighted"): values and both gradients against float64 on every backend."""

import backends
import named
import numpy as np
import pytest
import torch
from ops.packing.segments import SEGMENTS, with_gradients
from torch import Tensor

from mmkernels.ops.packing import segment_pool
from mmkernels.testing import assert_as_accurate
from mmkernels.testing.packing import cu_seqlens_of

# One column, a ragged vector, several tiles of columns.
WIDTHS = {"ragged": (1, 37, 1100), "long": (1, 1100)}


def in_torch(x: Tensor, weights: Tensor, lengths: list[int]) -> Tensor:
    """What a user would write, one segment at a time."""
    rows = (x * weights.to(x.dtype)[:, None])[: sum(lengths)]
    return torch.stack([part.sum(0) for part in rows.split(lengths)]) if lengths else rows


def truth_of(x: Tensor, weights: Tensor, lengths: list[int], grad: Tensor) -> list[Tensor]:
    """(out, grad_x, grad_weights) by definition, in NumPy's long double, because float64 results are judged too."""
    x, weights, grad = (t.double().cpu().numpy().astype(np.longdouble) for t in (x, weights, grad))
    out, grad_x, grad_weights = np.zeros_like(grad), np.zeros_like(x), np.zeros_like(weights)
    begin = 0
    for s, length in enumerate(lengths):
        rows = slice(begin, begin + length)
        out[s] = (weights[rows, None] * x[rows]).sum(0)
        grad_x[rows] = weights[rows, None] * grad[s]
        grad_weights[rows] = (x[rows] * grad[s]).sum(1)
        begin += length
    return [torch.from_numpy(value.astype(np.float64)) for value in (out, grad_x, grad_weights)]


@backends.every_device
@backends.every
@backends.every_dtype
def test_weighted(dtype, backend, device):
    backends.need("packing", backend, dtype, device)
    for segments, (lengths, left_over) in SEGMENTS.items():
        if backends.interpreted(backend, device):
            lengths = [min(length, 300) for length in lengths]
        for width in WIDTHS.get(segments, (37,)):
            with named.case(segments, width):
                check_weighted(lengths, left_over, width, dtype, backend, device)


def check_weighted(lengths, left_over, width, dtype, backend, device) -> None:
    x = torch.randn(sum(lengths) + left_over, width, device=device).to(dtype)
    weights = torch.randn(len(x), device=device).to(dtype)
    grad = torch.randn(len(lengths), width, device=device).to(dtype)
    cu = cu_seqlens_of(lengths, device)
    ours = with_gradients(lambda x, w: segment_pool(x, cu, "weighted", weights=w, backend=backend), grad, x, weights)
    plain = with_gradients(lambda x, w: in_torch(x, w, lengths), grad, x, weights)
    truth = truth_of(x, weights, lengths, grad)
    sizes = truth_of(x.abs(), weights.abs(), lengths, grad.abs())
    terms = (sizes[0], torch.zeros_like(sizes[1]), sizes[2])  # both sums cancel
    for what, a, b, c, sums in zip(("out", "grad_x", "grad_weights"), ours, plain, truth, terms, strict=True):
        assert a.dtype == dtype
        assert_as_accurate(what, a.cpu(), b.cpu(), c, terms=sums)


@backends.every
def test_weights_keep_their_precision(backend):
    """float32 weights of bfloat16 rows are not rounded to bfloat16."""
    backends.need("packing", backend, torch.bfloat16)
    x = torch.full((2, 3), 256.0, dtype=torch.bfloat16)
    weights = torch.tensor([1.0 + 2**-12, -1.0], requires_grad=True)
    out = segment_pool(x, cu_seqlens_of([2]), "weighted", weights=weights, backend=backend)
    assert out.tolist() == [[2**-4] * 3]
    out.sum().backward()
    assert weights.grad.tolist() == [768.0, 768.0]
    assert weights.grad.dtype == torch.float32


@backends.every
def test_layouts_and_trailing_dimensions(backend):
    backends.need("packing", backend)
    x, weights, cu = torch.randn(30, 4, 3), torch.randn(30), cu_seqlens_of([10, 0, 19])
    want = segment_pool(x, cu, "weighted", weights=weights, backend=backend)
    assert want.shape == (3, 4, 3)
    strange = torch.stack([weights, weights], 1)[:, 0]
    assert torch.equal(
        segment_pool(x.transpose(1, 2).contiguous().transpose(1, 2), cu, "weighted", weights=strange, backend=backend),
        want,
    )
    no_width = segment_pool(
        torch.zeros(30, 0, requires_grad=True), cu, "weighted", weights=weights.requires_grad_(), backend=backend
    )
    no_width.sum().backward()
    assert weights.grad.tolist() == [0.0] * 30


X, W, C = torch.zeros(6, 4), torch.zeros(6), cu_seqlens_of([2, 4])


@pytest.mark.parametrize(
    ("mode", "weights", "error", "message"),
    [
        ("weighted", None, ValueError, r"weights: expected \[T\] floating point, got None"),
        ("mean", W, ValueError, r'weights: expected None for mode "mean", got \[6\] float32'),
        ("weighted", W.long(), TypeError, r"weights: expected \[6\] floating point, got \[6\] int64"),
        ("weighted", W[:5], ValueError, r"weights: expected \[6\] floating point, got \[5\] float32"),
        ("weighted", X, ValueError, r"weights: expected \[6\] floating point, got \[6, 4\] float32"),
        ("weighted", W.to("meta"), ValueError, r"weights: expected \[6\] floating point on cpu, got .* on meta"),
    ],
)
def test_bad_weights(mode, weights, error, message):
    with pytest.raises(error, match=message):
        segment_pool(X, C, mode, weights=weights)
