"""The CUDA C++ packing kernels, emulated and on a device: exact moves, accurate sums, every layout, the same bits."""

import itertools

import named
import pytest
import torch
from ops.packing.segments import MODES, with_gradients
from torch import Tensor

from mmkernels.ops.packing import embed_splice, mrope_position_ids, pack, patchify, segment_pool, unpack, unpatchify
from mmkernels.testing import assert_as_accurate
from mmkernels.testing.packing import cu_seqlens_of, random_index, splice_inputs

WIDTHS = (1, 50, 264)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (rows, tokens, width): one element, odd widths, whole vectors, several to a thread, more than a block's columns.
SHAPES = ((1, 1, 1), (5, 9, 3), (40, 33, 64), (9, 21, 77), (7, 11, 1032), (4, 6, 4100))
# (lengths, rows left over): mixed lengths, one long, all empty, none, no rows
SEGMENTS = (([0, 3, 1, 0, 0, 17, 64, 65, 0], 5), ([700], 0), ([0, 0], 4), ([], 3), ([0, 0], 0))


def scattered(packed: Tensor, index: Tensor, rows: int) -> Tensor:
    """What a user would write."""
    kept = index >= 0
    return packed.new_zeros(rows, packed.shape[1]).index_add(0, index[kept], packed[kept])


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "row stride":
        return torch.cat([x, torch.full_like(x, torch.nan)], 1)[:, : x.shape[1]]
    if layout == "off by one":
        return x.new_full((x.numel() + 1,), torch.nan)[1:].view(x.shape).copy_(x)
    return x.T.contiguous().T


every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@every_dtype
def test_pack_and_unpack(cuda, dtype):
    for rows, tokens, width in SHAPES:
        with named.case(rows, tokens, width):
            source = torch.randn(rows, width, dtype=dtype, device=cuda.device)
            index = random_index(rows, tokens, device=cuda.device)  # repeats rows, leaves some out, has -1
            grad = torch.randn(tokens, width, device=cuda.device).to(dtype)
            packed, gradient = with_gradients(lambda x, index=index: pack(x, index, backend="native"), grad, source)
            assert torch.equal(packed, torch.where(index[:, None] >= 0, source[index.clamp(min=0)], 0))
            truth = scattered(grad.double(), index, rows)
            assert_as_accurate("gradient of pack", gradient, scattered(grad, index, rows), truth)
            assert torch.equal(unpack(grad, index, rows, backend="native"), gradient)


@every_dtype
def test_layouts(cuda, dtype):
    source = torch.randn(30, 40, device=cuda.device).to(dtype)
    index = random_index(30, 50, device=cuda.device)
    cu_seqlens = cu_seqlens_of([4, 0, 20], cuda.device)
    functions = {
        "pack": lambda x: pack(x, index, backend="native"),
        "unpack": lambda x: unpack(x, index[:30], 30, backend="native"),
        **{mode: lambda x, mode=mode: segment_pool(x, cu_seqlens, mode, backend="native") for mode in MODES},
    }
    for layout, (name, function) in itertools.product(("row stride", "off by one", "transposed"), functions.items()):
        assert torch.equal(function(laid_out(source, layout)), function(source)), (layout, name)


@every_dtype
@pytest.mark.parametrize("mode", MODES)
def test_segment_pool(cuda, mode, dtype):
    for (lengths, more), width in itertools.product(SEGMENTS, WIDTHS):
        with named.case(lengths, more, width):
            x = torch.randn(sum(lengths) + more, width, device=cuda.device).to(dtype)
            cu_seqlens = cu_seqlens_of(lengths, cuda.device)
            grad = torch.randn(len(lengths), width, device=cuda.device).to(dtype)
            results = [
                with_gradients(lambda x, b=b, cu=cu_seqlens: segment_pool(x, cu, mode, backend=b), grad, x.to(of))
                for b, of in (("native", dtype), ("reference", dtype), ("reference", torch.float64))
            ]
            for what, ours, plain, truth in zip(("out", "gradient"), *results, strict=True):
                if mode in ("max", "first"):
                    assert torch.equal(ours, plain), what
                else:
                    assert_as_accurate(what, ours, plain, truth)


def test_max_prefers_nan_and_the_first_of_equals(cuda):
    x = torch.tensor([[1.0, 2.0, torch.nan], [1.0, -torch.inf, 5.0], [0.0, 2.0, torch.nan]], device=cuda.device)
    x.requires_grad_()
    out = segment_pool(x, cu_seqlens_of([3], cuda.device), "max", backend="native")
    assert torch.equal(out[0, :2], torch.tensor([1.0, 2.0], device=cuda.device)) and out[0, 2].isnan()
    out.nansum().backward()
    assert torch.equal(x.grad[:, :2], torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]], device=cuda.device))


@every_dtype
def test_rows_that_many_name(cuda, dtype):
    """A frequent token: whole chunks of one target, with other targets before and after."""
    for width in (1, 40):
        with named.case(width):
            packed = torch.randn(410, width, device=cuda.device).to(dtype)
            index = torch.randint(-1, 5, (410,), device=cuda.device)
            index[70:400] = 2
            out = unpack(packed, index, 5, backend="native")
            assert_as_accurate("unpack", out, scattered(packed, index, 5), scattered(packed.double(), index, 5))


@every_dtype
def test_the_same_bits_whatever_runs_first(cuda, dtype):
    packed = torch.randn(400, 72, device=cuda.device).to(dtype)
    index = random_index(3, 400, device=cuda.device)  # about a hundred per row
    cu_seqlens = cu_seqlens_of([100, 0, 300], cuda.device)
    sums, pools = [], []
    for _ in cuda.schedules():
        sums.append(unpack(packed, index, 3, backend="native"))
        pools.append(segment_pool(packed, cu_seqlens, "sum", backend="native"))
    assert all(torch.equal(x, sums[0]) for x in sums) and all(torch.equal(x, pools[0]) for x in pools)


@every_dtype
def test_pack_from_several_sources(cuda, dtype):
    """One of them is not 16-byte aligned."""
    for sizes, width in itertools.product(((3, 4), (0, 5, 2), (2, 0, 1, 30)), (8, 33)):
        sources = [torch.randn(n, width, device=cuda.device).to(dtype) for n in sizes]
        sources[1] = laid_out(sources[1], "off by one")
        index = random_index(sum(sizes), 50, device=cuda.device)
        expected = pack(torch.cat(sources), index, backend="reference")
        assert torch.equal(pack(sources, index, backend="native"), expected), (sizes, width)


@every_dtype
def test_embed_splice(cuda, dtype):
    for shape in ((1, 1, 1, 1), (7, 20, 0, 3), (5, 12, 12, 16), (50, 130, 41, 72)):
        with named.case(shape):
            ids, table, features, dst_index = splice_inputs(*shape, dtype=dtype, device=cuda.device)
            grad = torch.randn(shape[1], shape[3], device=cuda.device).to(dtype)
            (out, grad_table, grad_features), (want, want_table, want_features) = (
                with_gradients(
                    lambda t, f, b=b, ids=ids, dst=dst_index: embed_splice(ids, t, f, dst, padding_idx=0, backend=b),
                    grad,
                    table,
                    features,
                )
                for b in ("native", "reference")
            )
            assert torch.equal(out, want) and torch.equal(grad_features, want_features)
            torch.testing.assert_close(grad_table, want_table)
            assert grad_table[0].count_nonzero() == 0


@every_dtype
def test_weighted_pool(cuda, dtype):
    for (lengths, more), width in itertools.product(SEGMENTS, WIDTHS):
        with named.case(lengths, more, width):
            x = torch.randn(sum(lengths) + more, width, device=cuda.device).to(dtype)
            weights, cu_seqlens = torch.randn(len(x), device=cuda.device), cu_seqlens_of(lengths, cuda.device)
            grad = torch.randn(len(lengths), width, device=cuda.device).to(dtype)
            results = [
                with_gradients(
                    lambda x, w, b=b, cu=cu_seqlens: segment_pool(x, cu, "weighted", weights=w, backend=b),
                    grad,
                    x.to(of_x),
                    weights.to(of_weights),
                )
                for b, of_x, of_weights in (
                    ("native", dtype, torch.float32),
                    ("reference", dtype, torch.float32),
                    ("reference", torch.float64, torch.float64),
                )
            ]
            for what, ours, plain, truth in zip(("out", "grad_x", "grad_weights"), *results, strict=True):
                assert_as_accurate(what, ours, plain, truth)


def test_mrope(cuda):
    cu_seqlens = cu_seqlens_of([300, 0, 9, 400], cuda.device)
    starts = torch.tensor([3, 40, 300, 330, 500], device=cuda.device)
    grid_thw = torch.tensor([[1, 4, 6], [5, 8, 8], [1, 2, 2], [9, 2, 4], [1, 10, 12]], device=cuda.device)
    args = (cu_seqlens, grid_thw, starts, 720)
    for rule in ("spatial", "largest"):
        got = mrope_position_ids(*args, advance=rule, backend="native")
        assert torch.equal(got, mrope_position_ids(*args, advance=rule, backend="reference")), rule


@every_dtype
def test_patchify(cuda, dtype):
    """Units of 16, 4 and 2 bytes, images of several sizes."""
    for patch, temporal, merge in ((2, 1, 1), (3, 2, 1), (16, 1, 2), (14, 2, 2), (4, 1, 3)):
        with named.case(patch, temporal, merge):
            grids = [(1, merge, 2 * merge), (2, 2 * merge, merge), (1, merge, merge)]
            images = [
                torch.randn(t * temporal, 3, h * patch, w * patch, device=cuda.device).to(dtype).requires_grad_()
                for t, h, w in grids
            ]
            options = {"temporal_patch_size": temporal, "merge_size": merge}
            tokens, grid_thw = patchify(images, patch, **options, backend="native")
            assert torch.equal(tokens, patchify(images, patch, **options, backend="reference")[0])
            grad = laid_out(torch.randn_like(tokens), "off by one")
            gradients = torch.autograd.grad(tokens, images, grad)
            back = unpatchify(grad, grid_thw.cpu(), patch, **options, backend="reference")
            assert all(torch.equal(a, b) for a, b in zip(gradients, back, strict=True))


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("backend", ("native", "triton"))
def test_large(backend, dtype):
    """Too slow for emulation."""
    source = torch.randn(50_000, 1024, device="cuda").to(dtype)
    index = random_index(50_000, 70_000, device="cuda")
    packed = pack(source, index, backend=backend)
    assert torch.equal(packed, torch.where(index[:, None] >= 0, source[index.clamp(min=0)], 0))
    plain, truth = (scattered(x, index, 50_000) for x in (packed, packed.double()))
    assert_as_accurate("unpack", unpack(packed, index, 50_000, backend=backend), plain, truth)
