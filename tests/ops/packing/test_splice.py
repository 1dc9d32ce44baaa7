"""embed_splice and gathers from several sources: exact rows, gradients against float64, bad input."""

import itertools

import backends
import named
import pytest
import torch
from ops.packing.segments import with_gradients

from mmkernels.ops.packing import embed_splice, pack
from mmkernels.testing import assert_as_accurate
from mmkernels.testing.packing import random_index, splice_inputs

# (vocabulary, tokens, features, width): one of each, no feature, all features, ragged, more than one tile of features
SHAPES = ((1, 1, 1, 1), (7, 20, 0, 3), (5, 12, 12, 16), (50, 130, 41, 77), (9, 20, 6, 1030))
SIZES = ((3, 4), (0, 5, 2), (2, 0, 1, 30), (3, 1, 4, 1, 5))


def in_torch(token_ids, table, features, dst_index, padding_idx=None):
    """What a user would write: a lookup, and masked_scatter in the order of the tokens."""
    kept = dst_index >= 0
    mask = torch.zeros(len(token_ids), dtype=torch.bool, device=table.device)
    mask[dst_index[kept]] = True
    embedded = torch.nn.functional.embedding(token_ids.masked_fill(mask, 0), table, padding_idx=padding_idx)
    in_order = features[kept][dst_index[kept].argsort()]
    return embedded.masked_scatter(mask[:, None], in_order)


@backends.every_device
@backends.every
@backends.every_dtype
def test_embed_splice(dtype, backend, device):
    backends.need("packing", backend, dtype, device)
    for shape in SHAPES:
        with named.case(shape):
            ids, table, features, dst_index = splice_inputs(*shape, dtype=dtype, device=device)
            grad = torch.randn(shape[1], shape[3], device=device).to(dtype)
            out, grad_table, grad_features = with_gradients(
                lambda t, f, ids=ids, dst=dst_index: embed_splice(ids, t, f, dst, backend=backend),
                grad,
                table,
                features,
            )
            of_user = lambda t, f, ids=ids, dst=dst_index: in_torch(ids, t, f, dst)  # noqa: E731
            plain = with_gradients(of_user, grad, table, features)
            truth = with_gradients(of_user, grad, table.double(), features.double())
            assert out.is_contiguous()
            assert torch.equal(out, plain[0])
            assert torch.equal(grad_features, plain[2])
            assert_as_accurate("grad_table", grad_table, plain[1], truth[1])


@backends.every
def test_padding_idx_gets_no_gradient(backend):
    backends.need("packing", backend)
    ids, table, features, dst = splice_inputs(6, 40, 5, 8)
    grad = torch.randn(40, 8)
    out, grad_table, _ = with_gradients(
        lambda t, f: embed_splice(ids, t, f, dst, padding_idx=2, backend=backend), grad, table, features
    )
    plain = with_gradients(lambda t, f: in_torch(ids, t, f, dst, padding_idx=2), grad, table, features)
    assert torch.equal(out, plain[0])
    assert grad_table[2].count_nonzero() == 0
    torch.testing.assert_close(grad_table, plain[1])


@backends.every
def test_placeholders_may_be_outside_the_vocabulary(backend):
    backends.need("packing", backend)
    out = embed_splice(
        torch.tensor([1, -200, 0, 99]), torch.eye(2), 5 * torch.ones(2, 2), torch.tensor([3, 1]), backend=backend
    )
    assert out.tolist() == [[0, 1], [5, 5], [1, 0], [5, 5]]


@backends.every
def test_frozen_inputs_get_no_gradient(backend):
    backends.need("packing", backend)
    token_ids, table, features, dst_index = splice_inputs(6, 40, 5, 8)
    features.requires_grad_()
    embed_splice(token_ids, table, features, dst_index, backend=backend).sum().backward()
    assert table.grad is None
    assert torch.equal(features.grad[dst_index >= 0], torch.ones_like(features)[dst_index >= 0])
    assert features.grad[dst_index < 0].count_nonzero() == 0


@backends.every
def test_empty_input(backend):
    backends.need("packing", backend)
    no_index, table = torch.zeros(0, dtype=torch.int64), torch.randn(3, 4, requires_grad=True)
    features = torch.zeros(0, 4, requires_grad=True)
    out = embed_splice(no_index, table, features, no_index, backend=backend)
    assert out.shape == (0, 4)
    out.sum().backward()
    assert table.grad.count_nonzero() == 0
    assert features.grad.shape == (0, 4)
    left_out = embed_splice(no_index, table, torch.ones(2, 4, requires_grad=True), torch.tensor([-1, -1]))
    left_out.sum().backward()


@backends.every
def test_layouts(backend):
    """Row strides, transposed tables, expanded features, strided indices; int32."""
    backends.need("packing", backend)
    token_ids, table, features, dst_index = splice_inputs(9, 30, 4, 6)
    want = embed_splice(token_ids, table, features, dst_index, backend=backend)
    strange = torch.cat([table, table], 1)[:, :6]
    twice = torch.stack([token_ids, token_ids], 1)[:, 0]
    args = (twice.int(), strange, features.t().contiguous().t(), dst_index.int())
    assert torch.equal(embed_splice(*args, backend=backend), want)
    one = torch.randn(1, 6)
    assert torch.equal(
        embed_splice(token_ids, table, one.expand(4, 6), dst_index, backend=backend),
        embed_splice(token_ids, table, one.repeat(4, 1), dst_index, backend=backend),
    )


IDS, TABLE, FEATURES, DST = splice_inputs(6, 10, 3, 4, some_left_out=False)
BAD = [
    ((IDS, TABLE.long(), FEATURES, DST), {}, TypeError, r"table: expected \[V, E\] floating point, got \[6, 4\] int64"),
    ((IDS, TABLE, FEATURES.double(), DST), {}, TypeError, r"features: expected \[F, 4\] float32, got \[3, 4\] float64"),
    ((IDS, TABLE, FEATURES[:, :3], DST), {}, ValueError, r"features: expected \[F, 4\] float32, got \[3, 3\] float32"),
    ((IDS.float(), TABLE, FEATURES, DST), {}, TypeError, r"token_ids: expected \[T\] int64, got \[10\] float32"),
    ((IDS[None], TABLE, FEATURES, DST), {}, ValueError, r"token_ids: expected \[T\] int64, got \[1, 10\] int64"),
    ((IDS, TABLE, FEATURES, DST[:2]), {}, ValueError, "dst_index: expected one entry for each of the 3 features"),
    (
        (IDS, TABLE, FEATURES, DST * 0 - 2),
        {},
        ValueError,
        r"dst_index: expected each in \[-1, 10\), got -2 at position 0",
    ),
    (
        (IDS, TABLE, FEATURES, DST * 0 + 10),
        {},
        ValueError,
        r"dst_index: expected each in \[-1, 10\), got 10 at position 0",
    ),
    (
        (IDS, TABLE, FEATURES, torch.tensor([4, 1, 4])),
        {},
        ValueError,
        "dst_index: expected each token once, got 4 at positions 0 and 2",
    ),
    (
        (torch.full((10,), 6), TABLE, FEATURES, torch.tensor([0, 1, 3])),
        {},
        ValueError,
        r"token_ids: expected each in \[0, 6\) where no feature goes, got 6 at position 2",
    ),
    ((IDS, TABLE, FEATURES, DST), {"padding_idx": 6}, ValueError, r"padding_idx: expected None or a row in \[0, 6\)"),
]


@pytest.mark.parametrize(("args", "options", "error", "message"), BAD, ids=[message[:45] for *_, message in BAD])
def test_bad_input(args, options, error, message):
    with pytest.raises(error, match=message):
        embed_splice(*args, **options)


@backends.every_device
@backends.every
@backends.every_dtype
def test_pack_from_several_sources(dtype, backend, device):
    """As if they were concatenated, bit for bit, gradients too."""
    backends.need("packing", backend, dtype, device)
    for sizes, width in itertools.product(SIZES, (1, 33)):
        sources = [torch.randn(n, 2 * width, device=device).to(dtype)[:, ::2].requires_grad_() for n in sizes]
        index = random_index(sum(sizes), 50, device=device)
        grad = torch.randn(50, width, device=device).to(dtype)
        results = []
        for given in (sources, torch.cat(sources)):
            out = pack(given, index, backend=backend)
            results.append((out, *torch.autograd.grad(out, sources, grad)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), (sizes, width)


def test_pack_of_several_sources_makes_no_copy_of_them():
    """Four sources are read in place: only the output is allocated, not their concatenation."""
    backends.need("packing", "native")
    big, small = torch.randn(4096, 64), torch.randn(8, 64)
    index = torch.tensor([0, 4096, 4100])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        pack([big, small], index, backend="native")
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert allocated < big.nbytes / 100
