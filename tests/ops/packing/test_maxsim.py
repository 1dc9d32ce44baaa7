"""Late interaction: values and gradients on every backend against the padded einsum in float64, and the edges."""

import functools
import itertools

import backends
import named
import pytest
import torch
import torch.nn.functional as F
from ops.packing.segments import with_gradients
from torch import Tensor, nn

from mmkernels import GradCache, maxsim
from mmkernels.testing import assert_as_accurate
from mmkernels.testing.packing import cu_seqlens_of, plain_maxsim

# name -> (lengths of the queries, lengths of the documents, rows left over of each)
BATCHES = {
    # Documents within a block, over several, empty first, in the middle and last, single tokens.
    "ragged": ([3, 1, 0, 17, 8], [0, 5, 70, 1, 0, 0, 33, 2, 64, 0], 0),
    "rows left over": ([4, 9], [12, 30], 5),
    "one": ([1], [1], 0),
    "equal": ([32] * 4, [32] * 4, 0),
    "all empty": ([0, 0], [0, 0, 0], 2),
    "empty documents": ([2, 3], [0, 0], 0),
    "no tokens": ([0], [0, 0], 0),
    "no queries": ([], [3, 4], 0),
    "no documents": ([3, 4], [], 2),
}
BLOCKS = (None, 16)


def batch(name: str, width: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *lengths, left_over = BATCHES[name]
    rows = [torch.randn(sum(n) + left_over, width, device=device).to(dtype) for n in lengths]
    return *rows, *(cu_seqlens_of(n, device) for n in lengths)


def absolute(q: Tensor, d: Tensor, cu_q: Tensor, cu_k: Tensor, weights: Tensor, reduction: str) -> list[Tensor]:
    """The absolute terms of scores and gradients, summed: all three of products that cancel."""
    scores, pairs, owner = [], (q @ d.T), torch.arange(len(q), device=q.device)
    at = torch.full((len(q), len(cu_k) - 1), -1, device=q.device)
    for b, (begin, end) in enumerate(itertools.pairwise(cu_k.tolist())):
        if end > begin and len(q):
            at[:, b] = pairs[:, begin:end].argmax(1) + begin
    q, d, weights = (x.abs().requires_grad_() for x in (q, d, weights))
    for begin, end in itertools.pairwise(cu_q.tolist()):
        own = owner[begin:end, None].expand(-1, at.shape[1])
        products = (q[own] * d[at[begin:end]]).sum(2) if len(d) else q.new_zeros(own.shape)
        total = products.masked_fill(at[begin:end] < 0, 0).sum(0)
        scores.append(total / max(1, end - begin) if reduction == "mean" else total)
    out = torch.stack(scores) if scores else q.new_zeros(0, at.shape[1])
    of = (q, d)
    grads = torch.autograd.grad((out * weights).sum() + 0 * (q.sum() + d.sum()), of)
    return [out.detach(), *grads]


def results(inputs, dtype: torch.dtype, function) -> list[Tensor]:
    """(scores, gradients of queries and documents) of several draws, each flat and joined."""
    drawn = []
    for q, d, *cu, weights in inputs:
        of = functools.partial(lambda q, d, cu: function(q, d, *cu), cu=cu)
        drawn.append([x.flatten() for x in with_gradients(of, weights, q.to(dtype), d.to(dtype))])
    return [torch.cat(parts) for parts in zip(*drawn, strict=True)]


@backends.every_device
@backends.every
@backends.every_dtype
def test_values_and_gradients(dtype, backend, device):
    """Several draws of small batches are judged at once."""
    backends.need("packing", backend, dtype, device)
    for name, width, reduction, block in itertools.product(BATCHES, (1, 33, 128), ("sum", "mean"), BLOCKS):
        if backends.interpreted(backend, device) and (width == 33) != (name == "ragged"):
            continue
        inputs = []
        for _ in range(1 if name in ("ragged", "equal") else 8):
            q, d, *cu = batch(name, width, dtype, device)
            inputs.append((q, d, *cu, torch.randn(len(cu[0]) - 1, len(cu[1]) - 1, device=device)))
        options = dict(reduction=reduction, block=block, backend=backend)
        ours = results(inputs, dtype, functools.partial(maxsim, **options))
        plain, truth = (
            results(inputs, of, functools.partial(plain_maxsim, reduction=reduction)) for of in (dtype, torch.float64)
        )
        assert ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        drawn = [absolute(*(x.double() if x.is_floating_point() else x for x in each), reduction) for each in inputs]
        terms = [torch.cat([x.flatten() for x in parts]) for parts in zip(*drawn, strict=True)]
        for what, *three, of in zip(
            ("scores", "grad_queries", "grad_documents"), ours, plain, truth, terms, strict=True
        ):
            assert_as_accurate(f"{name} {width} {reduction} {block}: {what}", *three, terms=of)


@backends.every_device
@backends.every
@pytest.mark.parametrize("scale", [1e-3, 300.0])
def test_adversarial_scale(scale, backend, device):
    """In float16 products of 300 x 300 overflow and those of 1e-3 x 1e-3 underflow; in float32 neither."""
    backends.need("packing", backend, torch.float16, device)
    q, d, *cu = batch("ragged", 33, torch.float16, device)
    q, d = (q * scale).half(), (d * scale).half()
    expected = plain_maxsim(q.double(), d.double(), *cu)
    torch.testing.assert_close(maxsim(q, d, *cu, backend=backend).double(), expected, rtol=1e-5, atol=1e-5 * scale**2)


@backends.every_device
@backends.every
def test_a_token_that_wins_thousands_of_times(backend, device):
    """Its gradient is a sum of as many terms, all of one sign; so is that of a query token over as many documents."""
    backends.need("packing", backend, device=device)
    many = 300 if backends.interpreted(backend, device) else 6000
    one, rows = torch.rand(2, 33, device=device), torch.rand(many, 33, device=device)
    weights = torch.rand(2, many, device=device)
    every, single, pair = (cu_seqlens_of(n, device) for n in ([1] * many, [1, 1], [1] * 2))
    for what, function, grad in (
        ("grad_documents", lambda x, y, run, **o: run(y, x, every, single, **o), weights.T),
        ("grad_queries", lambda x, y, run, **o: run(x, y, pair, every, **o), weights),
    ):
        ours = with_gradients(functools.partial(function, run=maxsim, backend=backend), grad, one, rows)
        plain, truth = (
            with_gradients(functools.partial(function, run=plain_maxsim), grad.to(of), one.to(of), rows.to(of))
            for of in (torch.float32, torch.float64)
        )
        assert_as_accurate(what, ours[1], plain[1], truth[1])


backend = backends.fixture("packing")


def test_products_are_not_rounded_before_the_maximum(backend):
    """Two products that bfloat16 cannot tell apart: the second is larger."""
    q = torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16)
    d = torch.tensor([[1.0, 0.0], [1.0, 2.0**-12]], dtype=torch.bfloat16, requires_grad=True)
    scores = maxsim(q, d, cu_seqlens_of([1]), cu_seqlens_of([2]), backend=backend)
    assert scores.item() == 1 + 2.0**-12
    assert torch.autograd.grad(scores.sum(), d)[0].tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize("block", [1, 2, 100])
def test_the_first_of_equals_wins(block, backend):
    """Also where the equals lie in different blocks."""
    d = torch.tensor([[0.0], [2.0], [2.0], [1.0], [2.0]]).requires_grad_()
    q = torch.tensor([[1.0], [3.0]])
    scores = maxsim(q, d, cu_seqlens_of([2]), cu_seqlens_of([5]), block=block, backend=backend)
    assert scores.item() == 8
    assert torch.autograd.grad(scores.sum(), d)[0].flatten().tolist() == [0, 4, 0, 0, 0]


@pytest.mark.parametrize("block", [None, 3])
def test_the_order_of_blocks_does_not_matter(block, backend):
    q, d, *cu = batch("ragged", 33, torch.float64)
    if backend == "triton":
        q, d = q.float(), d.float()
    torch.testing.assert_close(maxsim(q, d, *cu, block=block, backend=backend), plain_maxsim(q, d, *cu))


def test_nan_and_inf_stay_with_their_own(backend):
    lengths_q, lengths_d = [2, 3, 1], [4, 2, 5, 3]
    q, d = torch.randn(6, 5), torch.randn(14, 5)
    clean = maxsim(q, d, cu_seqlens_of(lengths_q), cu_seqlens_of(lengths_d), backend=backend)
    q[3, 1] = torch.nan  # query 1
    d[7] = torch.nan  # document 2, tokens 6 to 10
    d[12] = torch.inf  # document 3
    for block in (None, 3, 1):
        scores = maxsim(q, d, cu_seqlens_of(lengths_q), cu_seqlens_of(lengths_d), block=block, backend=backend)
        untouched = torch.ones(3, 4, dtype=torch.bool)
        untouched[1] = untouched[:, 2:] = False
        torch.testing.assert_close(scores[untouched], clean[untouched])
        assert scores[1].isnan().all() and scores[:, 2].isnan().all()
        assert not scores[[0, 2], 3].isfinite().all()


def test_empty_segments_score_zero_and_pass_no_gradient(backend):
    q, d = torch.full((3, 4), -1.0, requires_grad=True), torch.full((2, 4), torch.nan, requires_grad=True)
    scores = maxsim(q, d, cu_seqlens_of([0, 3]), cu_seqlens_of([0, 2, 0]), backend=backend)
    assert scores[0].tolist() == [0, 0, 0]
    assert scores[1, [0, 2]].tolist() == [0, 0]
    assert torch.autograd.grad(scores[:, [0, 2]].sum(), d)[0].count_nonzero() == 0
    clean = maxsim(q, torch.ones_like(d), cu_seqlens_of([0, 3]), cu_seqlens_of([0, 2, 0]), backend=backend)
    (grad,) = torch.autograd.grad(clean, q, torch.tensor([[1.0, 1, 1], [torch.nan, 0, torch.inf]]))
    assert grad.count_nonzero() == 0


def test_non_contiguous(backend):
    q, d, *cu = batch("ragged", 33, torch.float32)
    wide = [torch.randn(33, 2 * len(x)).T[::2].copy_(x) for x in (q, d)]
    wide = [x.T.contiguous().T for x in wide]
    assert not any(x.is_contiguous() for x in wide)
    grad = torch.randn(5, 10)
    strided = [torch.stack([boundary, boundary], 1)[:, 0] for boundary in cu]
    ours = with_gradients(lambda q, d: maxsim(q, d, *strided, backend=backend), grad, *wide)
    expected = with_gradients(lambda q, d: maxsim(q, d, *cu, backend=backend), grad, q, d)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_only_what_is_needed_is_computed(backend):
    q, d, *cu = batch("ragged", 33, torch.float32)
    for needing, calls in (((True, False), "gather"), ((False, True), "scatter")):
        leaves = [x.clone().requires_grad_(needs) for x, needs in zip((q, d), needing, strict=True)]
        loss = maxsim(*leaves, *cu, backend=backend).sum()
        with torch.profiler.profile() as profile:
            loss.backward()
        names = {event.name for event in profile.events() if "winners" in event.name}
        assert names == {f"mmkernels::packing_winners_{calls}_fwd"}


def test_autocast_keeps_dtypes(backend):
    q, d, *cu = batch("ragged", 33, torch.float32)
    grad = torch.randn(5, 10)

    def run(q: Tensor, d: Tensor) -> Tensor:
        return maxsim(q, d, *cu, backend=backend)

    expected = with_gradients(run, grad, q, d)
    with torch.autocast("cpu", torch.bfloat16):
        got = with_gradients(run, grad, q, d)
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


def test_low_precision_is_the_float32_result(backend):
    """The same products and sums as on the upcast tokens, gradients rounded once."""
    for dtype in (torch.bfloat16, torch.float16):
        q, d, *cu = batch("ragged", 33, dtype)
        grad = torch.randn(5, 10)
        low, wide = (
            with_gradients(lambda q, d, cu=cu: maxsim(q, d, *cu, backend=backend), grad, q.to(of), d.to(of))
            for of in (dtype, torch.float32)
        )
        assert torch.equal(low[0], wide[0])
        assert all(torch.equal(x, y.to(dtype)) for x, y in zip(low[1:], wide[1:], strict=True))


def saved_bytes(function) -> int:
    storages = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = function()  # noqa: F841  (keeps what is saved alive)
    return sum(storages.values())


def largest_allocation(function) -> int:
    with torch.profiler.profile(profile_memory=True) as profile:
        function().sum().backward()
    return max(event.cpu_memory_usage for event in profile.events())


def test_memory_does_not_grow_with_the_products_of_tokens():
    """What a graph keeps: the tokens, their winners, and nothing of Tq x Td. At work: a block."""
    q = torch.randn(16 * 16, 32, requires_grad=True)
    cu_q = cu_seqlens_of([16] * 16)
    for length in (50, 800):
        d = torch.randn(8 * length, 32, requires_grad=True)
        batch = q, d, cu_q, cu_seqlens_of([length] * 8)
        tokens, products, pairs = 4 * 32 * (len(q) + len(d)), 4 * len(q) * len(d), 4 * len(q) * 8
        assert saved_bytes(functools.partial(maxsim, *batch)) <= tokens + 2 * pairs + 4096
        ours = functools.partial(maxsim, *batch, block=64)
        assert largest_allocation(ours) <= 2 * tokens + 2 * pairs < products
        assert largest_allocation(functools.partial(plain_maxsim, *batch)) >= products


def test_in_a_loss_of_gradcache():
    """The contrastive loss of the docstring: chunks give the gradients of the whole batch."""
    tower, head = nn.Linear(6, 8), nn.Linear(6, 8)
    tokens = 7, 11  # of a sample, in each stream
    inputs = [torch.randn(9, n, 6) for n in tokens]
    scale = nn.Parameter(torch.tensor(3.0))

    def loss_fn(queries: Tensor, documents: Tensor) -> Tensor:
        cu = [cu_seqlens_of([n] * 9) for n in tokens]
        flat = [F.normalize(x.flatten(0, 1), dim=1) for x in (queries, documents)]
        return F.cross_entropy(maxsim(*flat, *cu, reduction="mean") * scale, torch.arange(9))

    parameters = [*tower.parameters(), *head.parameters(), scale]
    loss = loss_fn(tower(inputs[0]), head(inputs[1]))
    expected = torch.autograd.grad(loss, parameters)
    cached = GradCache([tower, head], loss_fn, chunk_size=4)(*inputs)
    torch.testing.assert_close(cached, loss.detach())
    for parameter, grad in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_rows_past_the_end_may_hold_anything(backend):
    """Also those of queries, which a weight of 0 would not hide; and nothing of theirs is another's."""
    q, d, *cu = batch("rows left over", 6, torch.float32)
    ends = [int(x[-1]) for x in cu]
    expected = with_gradients(lambda q, d: maxsim(q, d, *cu, backend=backend), torch.ones(2, 2), q, d)
    for odd in (torch.nan, torch.inf):
        q[ends[0] :], d[ends[1] :] = odd, odd
        got = with_gradients(lambda q, d: maxsim(q, d, *cu, backend=backend), torch.ones(2, 2), q, d)
        for name, ours, wanted in zip(("scores", "grad_queries", "grad_documents"), got, expected, strict=True):
            torch.testing.assert_close(ours, wanted, msg=lambda m, name=name: f"{name}: {m}")
    d[3] = torch.nan
    grad_queries = with_gradients(lambda q, d: maxsim(q, d, *cu, backend=backend), torch.ones(2, 2), q, d)[1]
    assert grad_queries[0].isnan().all() and (grad_queries[ends[0] :] == 0).all()


def test_bad_input():
    q, d, *cu = batch("rows left over", 6, torch.float32)
    call = functools.partial

    named.mistakes(
        (call(maxsim, [1.0], d, *cu), TypeError, r"queries: expected \[Tq, E\] floating point, got \[1.0\]"),
        (call(maxsim, q[0], d, *cu), ValueError, r"queries: expected \[Tq, E\] floating point, got \[6\]"),
        (call(maxsim, q.long(), d, *cu), TypeError, r"queries: expected .* got \[18, 6\] int64"),
        (call(maxsim, q, d.half(), *cu), TypeError, r"documents: expected \[Td, 6\] float32, got \[47, 6\] float16"),
        (call(maxsim, q, d[:, :5], *cu), ValueError, r"documents: expected \[Td, 6\] float32, got \[47, 5\]"),
        (call(maxsim, q, d.to("meta"), *cu), ValueError, r"documents: expected \[Td, 6\] float32 on cpu, got .* meta"),
        (call(maxsim, q, d, [0, 4], cu[1]), TypeError, r"cu_seqlens_q: expected \[Nq\+1\] int32, got \[0, 4\]"),
        (call(maxsim, q, d, cu[0].float(), cu[1]), TypeError, r"cu_seqlens_q: expected \[Nq\+1\] int32, got \[3\] flo"),
        (call(maxsim, q, d, cu[0][:0], cu[1]), ValueError, "cu_seqlens_q: .* with at least one entry"),
        (call(maxsim, q, d, cu[0], cu[1].to("meta")), ValueError, r"cu_seqlens_k: expected \[Nd\+1\] int32 on cpu"),
        (call(maxsim, q, d, cu[0] + 9, cu[1]), ValueError, r"cu_seqlens_q: expected to start at 0 and end within"),
        (call(maxsim, q, d, cu[0], cu[1] * 2), ValueError, r"cu_seqlens_k: .* end within \[0, 47\], got 0 ... 84"),
        (call(maxsim, q, d, cu[0], cu[1][[0, 2, 1]]), ValueError, "cu_seqlens_k: expected non-decreasing entries"),
        (call(maxsim, q, d, *cu, reduction="max"), ValueError, 'reduction: expected "sum" or "mean", got \'max\''),
        (call(maxsim, q, d, *cu, block=0), ValueError, "block: expected None or an integer >= 1, got 0"),
        (call(maxsim, q, d, *cu, block=1.5), TypeError, "block: expected None or an integer >= 1, got 1.5"),
        (call(maxsim, q, d, *cu, backend="cuda"), ValueError, "backend: expected None or one of"),
    )
