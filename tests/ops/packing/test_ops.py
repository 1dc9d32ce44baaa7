"""Gather, scatter and pooling on every backend: exact where nothing is added, else judged against float64."""

import isas
import pytest
import torch
from torch import Tensor

from mmkernels.ops.packing import pack, pad, segment_pool, unpack, unpad
from mmkernels.runtime.backends import candidates
from mmkernels.testing import assert_as_accurate
from mmkernels.testing.packing import cu_seqlens_of, random_index

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MODES = ["sum", "mean", "max", "first"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
every_backend = pytest.mark.parametrize("backend", ["native", "triton", "reference"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
every_device = pytest.mark.parametrize("device", DEVICES)

# One row, a width below a vector, ragged ends, several tiles, more than one tile of features.
SHAPES = [(1, 1, 1), (5, 9, 3), (40, 33, 64), (64, 130, 77), (31, 50, 1030)]
# Empty first, middle and last segments, single rows, segments beyond one chunk of the CPU kernel; rows left over.
SEGMENTS = {
    "ragged": ([0, 3, 1, 0, 0, 17, 64, 65, 0], 0),
    "rows left over": ([2, 130], 5),
    "long": ([1, 2100, 0, 1024, 3], 2),
    "one": ([7], 0),
    "all empty": ([0, 0], 4),
    "none": ([], 3),
    "no rows": ([0, 0], 0),
}


def needs(backend: str, device: str, dtype: torch.dtype) -> None:
    reason = candidates("packing", torch.device(device), dtype)[backend]
    if reason is not None:
        pytest.skip(reason)


def interpreted(backend: str, device: str) -> bool:
    """Triton's interpreter takes milliseconds per step of a kernel's loop."""
    return backend == "triton" and device == "cpu"


def plain_scatter(packed: Tensor, index: Tensor, rows: int) -> Tensor:
    """What a user would write."""
    kept = index >= 0
    return packed.new_zeros(rows, *packed.shape[1:]).index_add(0, index[kept], packed[kept])


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


def with_gradient(function, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    out = function(x)
    (gradient,) = torch.autograd.grad(out, x, grad.to(out.dtype))
    return out.detach(), gradient


@every_device
@every_backend
@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pack(shape, dtype, backend, device):
    needs(backend, device, dtype)
    rows, tokens, width = shape
    source = torch.randn(rows, width, device=device).to(dtype)
    index = random_index(rows, tokens, device=device)
    grad = torch.randn(tokens, width, device=device).to(dtype)
    out, gradient = with_gradient(lambda x: pack(x, index, backend=backend), source, grad)
    assert out.is_contiguous()
    assert torch.equal(out, torch.where(index[:, None] >= 0, source[index.clamp(min=0)], 0))
    plain = plain_scatter(grad, index, rows)
    assert_as_accurate("grad_source", gradient, plain, plain_scatter(grad.double(), index, rows))


@every_device
@every_backend
@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpack(shape, dtype, backend, device):
    needs(backend, device, dtype)
    rows, tokens, width = shape
    packed = torch.randn(tokens, width, device=device).to(dtype)
    index = random_index(rows, tokens, device=device)
    grad = torch.randn(rows, width, device=device).to(dtype)
    out, gradient = with_gradient(lambda x: unpack(x, index, rows, backend=backend), packed, grad)
    assert out.is_contiguous()
    assert_as_accurate("out", out, plain_scatter(packed, index, rows), plain_scatter(packed.double(), index, rows))
    assert torch.equal(gradient, torch.where(index[:, None] >= 0, grad[index.clamp(min=0)], 0))


@every_device
@every_backend
@every_dtype
def test_unpack_adds_long_columns_accurately(dtype, backend, device):
    """One row that thousands name: the sum stays as good as float32 allows."""
    needs(backend, device, dtype)
    tokens = 500 if interpreted(backend, device) else 5000
    packed = torch.randn(tokens, 20, device=device).to(dtype) + 1
    index = torch.zeros(tokens, dtype=torch.int64, device=device)
    index[::7] = 1
    out = unpack(packed, index, 3, backend=backend)
    assert_as_accurate("out", out, plain_scatter(packed, index, 3), plain_scatter(packed.double(), index, 3))
    assert out[2].count_nonzero() == 0


@every_device
@every_backend
def test_pack_then_unpack_is_the_identity(backend, device):
    needs(backend, device, torch.float32)
    x = torch.randn(57, 33, device=device)
    index = torch.randperm(57, device=device)
    assert torch.equal(unpack(pack(x, index, backend=backend), index, backend=backend), x)


@every_device
@every_backend
@every_dtype
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("segments", SEGMENTS)
def test_segment_pool(segments, mode, dtype, backend, device):
    needs(backend, device, dtype)
    lengths, left_over = SEGMENTS[segments]
    if interpreted(backend, device):
        lengths = [min(length, 300) for length in lengths]
    for width in (1, 37, 300):
        check_pool(lengths, left_over, width, mode, dtype, backend, device)


def check_pool(lengths, left_over, width, mode, dtype, backend, device) -> None:
    x = torch.randn(sum(lengths) + left_over, width, device=device).to(dtype)
    cu_seqlens = cu_seqlens_of(lengths, device)
    grad = torch.randn(len(lengths), width, device=device).to(dtype)
    out, gradient = with_gradient(lambda x: segment_pool(x, cu_seqlens, mode, backend=backend), x, grad)
    plain, plain_gradient = with_gradient(lambda x: plain_pool(x, lengths, mode), x, grad)
    truth, true_gradient = with_gradient(lambda x: plain_pool(x, lengths, mode), x.double(), grad.double())
    assert out.dtype == dtype
    if mode in ("max", "first"):
        assert torch.equal(out, plain)
    else:
        assert_as_accurate("out", out, plain, truth)
    if mode == "max" and dtype in (torch.bfloat16, torch.float16):
        # Low precision has ties, whose gradient plain PyTorch gives to any one of them: see the test of ties.
        assert torch.equal(plain_pool(gradient, lengths, "sum").double().sum(), grad.double()[_full(lengths)].sum())
    else:
        assert_as_accurate("grad_x", gradient, plain_gradient, true_gradient)


def _full(lengths: list[int]) -> Tensor:
    return torch.tensor(lengths, dtype=torch.int64) > 0


@every_device
@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_max_gives_its_gradient_to_the_first_of_equals(dtype, backend, device):
    needs(backend, device, dtype)
    lengths = [300, 0, 1500, 5]
    x = torch.randint(0, 4, (sum(lengths), 9), device=device).to(dtype)
    grad = torch.arange(1, 37, device=device).reshape(4, 9).to(dtype)
    cu_seqlens = cu_seqlens_of(lengths, device)
    out, gradient = with_gradient(lambda x: segment_pool(x, cu_seqlens, "max", backend=backend), x, grad)
    expected = torch.zeros_like(x)
    for s, (begin, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        for e in range(9):
            if begin < end:
                first = begin + (x[begin:end, e] == x[begin:end, e].max()).nonzero()[0, 0]
                expected[first, e] = grad[s, e]
    assert torch.equal(gradient, expected)
    assert out[1].count_nonzero() == 0


@every_device
@every_backend
def test_max_of_nan_and_infinities(backend, device):
    needs(backend, device, torch.float32)
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([[1.0, -inf], [nan, -inf], [3.0, 2.0], [-inf, inf], [-inf, nan], [nan, nan]], device=device)
    cu_seqlens = cu_seqlens_of([3, 1, 2], device)
    grad = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], device=device)
    out, gradient = with_gradient(lambda x: segment_pool(x, cu_seqlens, "max", backend=backend), x, grad)
    expected = torch.tensor([[nan, 2.0], [-inf, inf], [nan, nan]], device=device)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    assert gradient.tolist() == [[0, 0], [1, 0], [0, 2], [3, 4], [0, 6], [5, 0]]


@every_device
@every_backend
@pytest.mark.parametrize("mode", MODES)
def test_non_contiguous_input_and_gradient(mode, backend, device):
    needs(backend, device, torch.float32)
    wide = torch.randn(40, 12, device=device)
    cu_seqlens = torch.stack([cu_seqlens_of([10, 0, 25], device)] * 2, 1)[:, 0]
    index = torch.stack([random_index(40, 30, device=device)] * 2, 1)[:, 0]
    for x in (wide[:, :7], wide.t()[:, :12].t(), wide[::2], wide[:, ::2], wide[:1].expand(40, 12)):
        rows = x.shape[0]
        cu = cu_seqlens.clamp(max=rows)
        same = x.contiguous()
        for function in (
            lambda x, cu=cu: segment_pool(x, cu, mode, backend=backend),
            lambda x, rows=rows: pack(x, index.clamp(max=rows - 1), backend=backend),
            lambda x, rows=rows: unpack(x, index[:rows].clamp(max=8), 9, backend=backend) if rows <= 30 else x,
        ):
            grad = torch.randn_like(function(same)).t().contiguous().t()
            for got, expected in zip(
                with_gradient(function, x, grad), with_gradient(function, same, grad), strict=True
            ):
                assert torch.equal(got, expected)


@every_backend
def test_trailing_dimensions_and_none(backend):
    needs(backend, "cpu", torch.float32)
    x = torch.randn(6, 2, 3)
    index = torch.tensor([5, -1, 0])
    assert torch.equal(pack(x, index, backend=backend)[[0, 2]], x[[5, 0]])
    assert unpack(pack(x, index, backend=backend), index, 6, backend=backend).shape == (6, 2, 3)
    assert segment_pool(x, cu_seqlens_of([2, 4]), backend=backend).shape == (2, 2, 3)
    vector = torch.randn(6)
    assert torch.equal(pack(vector, index, backend=backend)[[0, 2]], vector[[5, 0]])
    assert segment_pool(vector, cu_seqlens_of([2, 4]), "sum", backend=backend).shape == (2,)


@every_backend
def test_empty_input(backend):
    needs(backend, "cpu", torch.float32)
    nothing, no_index = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    assert pack(nothing, no_index, backend=backend).shape == (0, 4)
    assert torch.equal(pack(nothing, torch.tensor([-1, -1]), backend=backend), torch.zeros(2, 4))
    assert torch.equal(unpack(nothing, no_index, 3, backend=backend), torch.zeros(3, 4))
    assert unpack(nothing, no_index, backend=backend).shape == (0, 4)
    assert pack(torch.zeros(3, 0), torch.tensor([1]), backend=backend).shape == (1, 0)
    for mode in MODES:
        assert segment_pool(torch.zeros(3, 0), cu_seqlens_of([1, 2]), mode, backend=backend).shape == (2, 0)


@every_backend
def test_sources_and_sizes(backend):
    needs(backend, "cpu", torch.float32)
    parts = [torch.randn(n, 5, requires_grad=True) for n in (3, 0, 4)]
    index = torch.tensor([6, 0, -1, 3, 2])
    packed = pack(parts, index, backend=backend)
    assert torch.equal(packed, pack(torch.cat(parts), index, backend=backend))
    packed.sum().backward()
    assert parts[0].grad.sum(1).tolist() == [5, 0, 5]
    back = unpack(packed, index, [3, 0, 4], backend=backend)
    assert [part.shape[0] for part in back] == [3, 0, 4]
    assert torch.equal(back[2], torch.cat([parts[2][:1], torch.zeros(2, 5), parts[2][3:]]))


@every_device
@every_backend
def test_pad_and_unpad(backend, device):
    needs(backend, device, torch.float32)
    lengths = [3, 0, 5, 1]
    x = torch.randn(9, 4, device=device, requires_grad=True)
    cu_seqlens = cu_seqlens_of(lengths, device)
    padded = pad(x, cu_seqlens, 6, backend=backend)
    expected = torch.nn.utils.rnn.pad_sequence(list(x.split(lengths)), batch_first=True)
    assert torch.equal(padded[:, :5], expected)
    assert padded[:, 5].count_nonzero() == 0
    tokens, again = unpad(padded, cu_seqlens.diff(), 9, backend=backend)
    assert torch.equal(tokens, x)
    assert torch.equal(again, cu_seqlens)
    assert again.dtype == torch.int32
    (gradient,) = torch.autograd.grad(tokens.square().sum(), x)
    assert torch.equal(gradient, 2 * x)

    mask = torch.rand(4, 6, device=device) < 0.5
    tokens, cu_seqlens = unpad(padded, mask, 24, backend=backend)
    count = int(mask.sum())
    assert torch.equal(tokens[:count], padded[mask])
    assert tokens[count:].count_nonzero() == 0
    assert cu_seqlens.diff().tolist() == mask.sum(1).tolist()


def test_pad_and_unpad_count_on_cpu():
    x = torch.randn(9, 4)
    cu_seqlens = cu_seqlens_of([3, 0, 5, 1])
    padded = pad(x, cu_seqlens)
    assert padded.shape == (4, 5, 4)
    assert torch.equal(unpad(padded, cu_seqlens.diff())[0], x)
    assert pad(x, cu_seqlens_of([])).shape == (0, 0, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_for_any_number_of_threads(dtype):
    needs("native", "cpu", dtype)
    lengths = [3000, 1, 0, 700, 2500]
    x = torch.randn(sum(lengths), 96).to(dtype)
    index = torch.randint(0, 50, (len(x),))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            pooled = [segment_pool(x, cu_seqlens_of(lengths), mode, backend="native") for mode in MODES]
            results.append([*pooled, pack(x, index, backend="native"), unpack(x, index, 50, backend="native")])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for first, again in zip(results[0], other, strict=True):
            assert torch.equal(first, again)


def test_large_outputs_bypass_the_caches_with_the_same_bytes():
    """Outputs of 8 MiB and more are streamed on x86: rows of whole cache lines, and others."""
    needs("native", "cpu", torch.float32)
    for width in (512, 500):
        x = torch.randn(6000, width)
        index = random_index(6000, 6000)
        assert torch.equal(pack(x, index, backend="native"), pack(x, index, backend="reference"))
        inverse = torch.randperm(6000)
        assert torch.equal(unpack(x, inverse, backend="native")[inverse], x)
        grad = torch.randn(3, width)
        for mode in MODES:
            run = [
                with_gradient(
                    lambda x, m=mode, b=b: segment_pool(x, cu_seqlens_of([0, 2900, 3000]), m, backend=b), x, grad
                )[1]
                for b in ("native", "reference")
            ]
            assert torch.equal(*run)


def test_offsets_beyond_32_bits():
    """The source has more than 2^31 elements; only a few of its pages are ever touched."""
    needs("native", "cpu", torch.bfloat16)
    rows, width = 2**21 + 3, 1024
    source = torch.empty(rows, width, dtype=torch.bfloat16)
    source[rows - 1], source[5] = 3.0, 4.0
    out = pack(source, torch.tensor([rows - 1, 5, -1]), backend="native")
    assert out[:, 0].tolist() == out[:, -1].tolist() == [3.0, 4.0, 0.0]
    tail = torch.tensor([0, 0, rows - 1, rows], dtype=torch.int32)
    assert segment_pool(source, tail, "first", backend="native")[2].sum() == 3.0 * width


@isas.each
def test_each_instruction_set(isa):
    isas.run_on(isa, check_all_dtypes)


def check_all_dtypes() -> None:
    for dtype in DTYPES:
        x, lengths = torch.randn(1500, 53).to(dtype), [1100, 0, 300, 37]
        index = random_index(40, 1500)
        assert torch.equal(unpack(x, index, 40), unpack(x, index, 40)), dtype
        torch.testing.assert_close(unpack(x, index, 40), unpack(x, index, 40, backend="reference"))
        assert torch.equal(pack(x, index), pack(x, index, backend="reference")), dtype
        for mode in MODES:
            got, want = (segment_pool(x, cu_seqlens_of(lengths), mode, backend=b) for b in ("native", "reference"))
            torch.testing.assert_close(got, want)
