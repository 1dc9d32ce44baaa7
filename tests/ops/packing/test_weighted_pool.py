"""segment_pool(mode="weighted"): values and both gradients against float64 on every backend."""

import numpy as np
import pytest
import torch
from torch import Tensor

from mmkernels.ops.packing import segment_pool
from mmkernels.runtime.backends import candidates
from mmkernels.testing import assert_as_accurate
from mmkernels.testing.packing import cu_seqlens_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
every_backend = pytest.mark.parametrize("backend", ["native", "triton", "reference"])
every_device = pytest.mark.parametrize("device", DEVICES)
SEGMENTS = {
    "ragged": ([0, 3, 1, 0, 0, 17, 64, 65, 0], 0),
    "rows left over": ([2, 130], 5),
    "long": ([1, 2100, 0, 1024, 3], 2),
    "all empty": ([0, 0], 4),
    "none": ([], 3),
    "no rows": ([0, 0], 0),
}


def needs(backend: str, device: str, dtype: torch.dtype) -> None:
    reason = candidates("packing", torch.device(device), dtype)[backend]
    if reason is not None:
        pytest.skip(reason)


def in_torch(x: Tensor, weights: Tensor, lengths: list[int]) -> Tensor:
    """What a user would write, one segment at a time."""
    rows = (x * weights.to(x.dtype)[:, None])[: sum(lengths)]
    return torch.stack([part.sum(0) for part in rows.split(lengths)]) if lengths else rows


def truth_of(x: Tensor, weights: Tensor, lengths: list[int], grad: Tensor) -> list[Tensor]:
    """(out, grad_x, grad_weights) by the definition, in NumPy's long double: float64 results are judged too."""
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


def with_gradients(function, x, weights, grad):
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    out = function(x, weights)
    return out.detach(), *torch.autograd.grad(out, (x, weights), grad.to(out.dtype))


@every_device
@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("segments", SEGMENTS)
def test_weighted(segments, dtype, backend, device):
    needs(backend, device, dtype)
    lengths, left_over = SEGMENTS[segments]
    if backend == "triton" and device == "cpu":  # the interpreter is slow
        lengths = [min(length, 300) for length in lengths]
    for width in (1, 37, 1100):
        x = torch.randn(sum(lengths) + left_over, width, device=device).to(dtype)
        weights = torch.randn(len(x), device=device).to(dtype)
        grad = torch.randn(len(lengths), width, device=device).to(dtype)
        cu = cu_seqlens_of(lengths, device)
        ours = with_gradients(
            lambda x, w, cu=cu: segment_pool(x, cu, "weighted", weights=w, backend=backend), x, weights, grad
        )
        plain = with_gradients(lambda x, w: in_torch(x, w, lengths), x, weights, grad)
        truth = truth_of(x, weights, lengths, grad)
        sizes = truth_of(x.abs(), weights.abs(), lengths, grad.abs())
        terms = (sizes[0], torch.zeros_like(sizes[1]), sizes[2])  # both sums cancel
        for what, a, b, c, sums in zip(("out", "grad_x", "grad_weights"), ours, plain, truth, terms, strict=True):
            assert a.dtype == dtype
            assert_as_accurate(f"{what} {width}", a.cpu(), b.cpu(), c, terms=sums)


@every_backend
def test_weights_keep_their_precision(backend):
    """float32 weights of bfloat16 rows are not rounded to bfloat16."""
    needs(backend, "cpu", torch.bfloat16)
    x = torch.full((2, 3), 256.0, dtype=torch.bfloat16)
    weights = torch.tensor([1.0 + 2**-12, -1.0], requires_grad=True)
    out = segment_pool(x, cu_seqlens_of([2]), "weighted", weights=weights, backend=backend)
    assert out.tolist() == [[2**-4] * 3]
    out.sum().backward()
    assert weights.grad.tolist() == [768.0, 768.0]
    assert weights.grad.dtype == torch.float32


@every_backend
def test_weights_of_one_over_the_length_are_the_mean(backend):
    needs(backend, "cpu", torch.float64)
    x, lengths = torch.randn(40, 5, dtype=torch.float64) if backend != "triton" else torch.randn(40, 5), [9, 0, 31]
    weights = torch.cat([torch.full((n,), 1 / max(n, 1), dtype=x.dtype) for n in lengths])
    cu = cu_seqlens_of(lengths)
    got = segment_pool(x, cu, "weighted", weights=weights, backend=backend)
    torch.testing.assert_close(got, segment_pool(x, cu, "mean", backend=backend))


@every_backend
def test_layouts_and_trailing_dimensions(backend):
    needs(backend, "cpu", torch.float32)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_for_any_number_of_threads(dtype):
    needs("native", "cpu", dtype)
    lengths = [3000, 1, 0, 700]
    x, weights, grad = torch.randn(3701, 96).to(dtype), torch.randn(3701), torch.randn(4, 96).to(dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            run = lambda x, w: segment_pool(x, cu_seqlens_of(lengths), "weighted", weights=w, backend="native")  # noqa: E731
            results.append(with_gradients(run, x, weights, grad))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


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
