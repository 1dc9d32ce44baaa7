"""pack, unpack, pad and unpad on every backend: exact where nothing is added, otherwise against float64."""

import backends
import isas
import named
import pytest
import torch
from ops.packing.segments import MODES, with_gradients
from torch import Tensor

from mmkernels.ops.packing import embed_splice, pack, pad, segment_pool, unpack, unpad
from mmkernels.testing import assert_as_accurate
from mmkernels.testing.packing import cu_seqlens_of, random_index, splice_inputs

# (rows, tokens, width): one row, a width below a vector, ragged ends, several tiles, more than one tile of features.
SHAPES = ((1, 1, 1), (5, 9, 3), (40, 33, 64), (64, 130, 77), (31, 50, 1030))


def plain_scatter(packed: Tensor, index: Tensor, rows: int) -> Tensor:
    """What a user would write."""
    kept = index >= 0
    return packed.new_zeros(rows, *packed.shape[1:]).index_add(0, index[kept], packed[kept])


@backends.every_device
@backends.every
@backends.every_dtype
def test_pack(dtype, backend, device):
    backends.need("packing", backend, dtype, device)
    for rows, tokens, width in SHAPES:
        with named.case(rows, tokens, width):
            source = torch.randn(rows, width, device=device).to(dtype)
            index = random_index(rows, tokens, device=device)
            grad = torch.randn(tokens, width, device=device).to(dtype)
            out, gradient = with_gradients(lambda x, index=index: pack(x, index, backend=backend), grad, source)
            assert out.is_contiguous()
            assert torch.equal(out, torch.where(index[:, None] >= 0, source[index.clamp(min=0)], 0))
            plain = plain_scatter(grad, index, rows)
            assert_as_accurate("grad_source", gradient, plain, plain_scatter(grad.double(), index, rows))


@backends.every_device
@backends.every
@backends.every_dtype
def test_unpack(dtype, backend, device):
    backends.need("packing", backend, dtype, device)
    for rows, tokens, width in SHAPES:
        with named.case(rows, tokens, width):
            packed = torch.randn(tokens, width, device=device).to(dtype)
            index = random_index(rows, tokens, device=device)
            grad = torch.randn(rows, width, device=device).to(dtype)
            out, gradient = with_gradients(
                lambda x, index=index, rows=rows: unpack(x, index, rows, backend=backend), grad, packed
            )
            assert out.is_contiguous()
            plain, truth = (plain_scatter(x, index, rows) for x in (packed, packed.double()))
            assert_as_accurate("out", out, plain, truth)
            assert torch.equal(gradient, torch.where(index[:, None] >= 0, grad[index.clamp(min=0)], 0))

    # Thousands of tokens take one row: its sum stays as accurate as float32 allows.
    tokens = 500 if backends.interpreted(backend, device) else 5000
    packed = torch.randn(tokens, 20, device=device).to(dtype) + 1
    index = torch.zeros(tokens, dtype=torch.int64, device=device)
    index[::7] = 1
    out = unpack(packed, index, 3, backend=backend)
    plain, truth = (plain_scatter(x, index, 3) for x in (packed, packed.double()))
    assert_as_accurate("out of a long column", out, plain, truth)
    assert out[2].count_nonzero() == 0


def strided(x: Tensor) -> Tensor:
    return torch.stack([x, x], 1)[:, 0]


@backends.every_device
@backends.every
def test_layouts_of_input_and_gradient(backend, device):
    """Column slices, transposed, every other row or column, expanded; strided boundaries and indices."""
    backends.need("packing", backend, device=device)
    wide = torch.randn(40, 12, device=device)
    index = random_index(40, 40, device=device)
    layouts = {
        "column slice": wide[:, :7],
        "transposed": wide.t().contiguous().t(),
        "every other row": wide[::2],
        "every other column": wide[:, ::2],
        "expanded": wide[:1].expand(40, 12),
    }
    for layout, x in layouts.items():
        rows = x.shape[0]
        cu_seqlens = strided(cu_seqlens_of([10, 0, rows - 15], device))
        rows_of, into = strided(index.clamp(max=rows - 1)), strided(index[:rows].clamp(max=8))
        functions = {
            **{m: lambda x, m=m, cu=cu_seqlens: segment_pool(x, cu, m, backend=backend) for m in MODES},
            "pack": lambda x, index=rows_of: pack(x, index, backend=backend),
            "unpack": lambda x, index=into: unpack(x, index, 9, backend=backend),
        }
        for name, function in functions.items():
            same = x.contiguous()
            grad = torch.randn_like(function(same)).t().contiguous().t()
            results = (with_gradients(function, grad, given) for given in (x, same))
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), (layout, name)


@backends.every
def test_any_number_of_trailing_dimensions(backend):
    backends.need("packing", backend)
    x = torch.randn(6, 2, 3)
    index = torch.tensor([5, -1, 0])
    assert torch.equal(pack(x, index, backend=backend)[[0, 2]], x[[5, 0]])
    assert unpack(pack(x, index, backend=backend), index, 6, backend=backend).shape == (6, 2, 3)
    assert segment_pool(x, cu_seqlens_of([2, 4]), backend=backend).shape == (2, 2, 3)
    vector = torch.randn(6)
    assert torch.equal(pack(vector, index, backend=backend)[[0, 2]], vector[[5, 0]])
    assert segment_pool(vector, cu_seqlens_of([2, 4]), "sum", backend=backend).shape == (2,)


@backends.every
def test_empty_input(backend):
    backends.need("packing", backend)
    nothing, no_index = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    assert pack(nothing, no_index, backend=backend).shape == (0, 4)
    assert torch.equal(pack(nothing, torch.tensor([-1, -1]), backend=backend), torch.zeros(2, 4))
    assert torch.equal(unpack(nothing, no_index, 3, backend=backend), torch.zeros(3, 4))
    assert unpack(nothing, no_index, backend=backend).shape == (0, 4)
    assert pack(torch.zeros(3, 0), torch.tensor([1]), backend=backend).shape == (1, 0)
    for mode in MODES:
        assert segment_pool(torch.zeros(3, 0), cu_seqlens_of([1, 2]), mode, backend=backend).shape == (2, 0)


@backends.every
def test_sources_and_sizes(backend):
    backends.need("packing", backend)
    parts = [torch.randn(n, 5, requires_grad=True) for n in (3, 0, 4)]
    index = torch.tensor([6, 0, -1, 3, 2])
    packed = pack(parts, index, backend=backend)
    assert torch.equal(packed, pack(torch.cat(parts), index, backend=backend))
    packed.sum().backward()
    assert parts[0].grad.sum(1).tolist() == [5, 0, 5]
    back = unpack(packed, index, [3, 0, 4], backend=backend)
    assert [part.shape[0] for part in back] == [3, 0, 4]
    assert torch.equal(back[2], torch.cat([parts[2][:1], torch.zeros(2, 5), parts[2][3:]]))


@backends.every_device
@backends.every
def test_pad_and_unpad(backend, device):
    backends.need("packing", backend, device=device)
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
    backends.need("packing", "native", dtype)
    lengths = [3000, 1, 0, 700, 2500]
    x, grad = torch.randn(sum(lengths), 96).to(dtype), torch.randn(len(lengths), 96).to(dtype)
    index, weights, cu_seqlens = torch.randint(0, 50, (len(x),)), torch.randn(len(x)), cu_seqlens_of(lengths)
    ids, table, features, dst_index = splice_inputs(30, 4000, 300, 96, dtype=dtype)
    grad_of_splice = torch.randn(4000, 96)

    def run() -> list[Tensor]:
        pooled = [segment_pool(x, cu_seqlens, mode, backend="native") for mode in MODES]
        weighted = with_gradients(
            lambda x, w: segment_pool(x, cu_seqlens, "weighted", weights=w, backend="native"), grad, x, weights
        )
        spliced = with_gradients(
            lambda t, f: embed_splice(ids, t, f, dst_index, backend="native"), grad_of_splice, table, features
        )
        return [
            *pooled,
            *weighted,
            *spliced,
            pack(x, index, backend="native"),
            unpack(x, index, 50, backend="native"),
        ]

    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_large_outputs_bypass_the_caches_with_the_same_bytes():
    """Outputs of 8 MiB and more are streamed on x86: rows of whole cache lines, and others."""
    backends.need("packing", "native")
    for width in (512, 500):
        x = torch.randn(6000, width)
        index = random_index(6000, 6000)
        assert torch.equal(pack(x, index, backend="native"), pack(x, index, backend="reference"))
        inverse = torch.randperm(6000)
        assert torch.equal(unpack(x, inverse, backend="native")[inverse], x)
        grad = torch.randn(3, width)
        for mode in MODES:
            run = [
                with_gradients(
                    lambda x, m=mode, b=b: segment_pool(x, cu_seqlens_of([0, 2900, 3000]), m, backend=b), grad, x
                )[1]
                for b in ("native", "reference")
            ]
            assert torch.equal(*run), (width, mode)


def test_offsets_beyond_32_bits():
    """The source has more than 2^31 elements, of which only a few pages are touched."""
    backends.need("packing", "native", torch.bfloat16)
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
    for dtype in backends.DTYPES:
        with named.case(dtype):
            x, lengths = torch.randn(1500, 53).to(dtype), [1100, 0, 300, 37]
            index = random_index(40, 1500)
            torch.testing.assert_close(unpack(x, index, 40), unpack(x, index, 40, backend="reference"))
            assert torch.equal(pack(x, index), pack(x, index, backend="reference")), "pack"
            with_nan = x.masked_fill(torch.rand(x.shape) < 1e-3, torch.nan)
            cu_seqlens = cu_seqlens_of(lengths)
            for what, given, mode in [*((mode, x, mode) for mode in MODES), ("max of NaN", with_nan, "max")]:
                got, want = (segment_pool(given, cu_seqlens, mode, backend=b) for b in ("native", "reference"))
                torch.testing.assert_close(got, want, equal_nan=True, msg=lambda m, what=what: f"{what}: {m}")
