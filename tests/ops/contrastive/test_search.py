"""Softmax-weighted negatives and streaming top-k."""

from functools import partial

import backends
import named
import pytest
import torch

from mmkernels import sample_negatives, topk_similar

backend = backends.fixture("contrastive")


def drawn(seed, *args, **options):
    return sample_negatives(*args, generator=torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_negatives_follow_the_softmax(backend):
    """One query many times against few keys: frequencies within five standard deviations of the probabilities.

    Triton draws the same keys, as the next test shows.
    """
    backends.need("contrastive", backend)
    query, keys = torch.randn(1, 8), torch.randn(7, 8)
    draws = 20_000
    index = drawn(1, query.expand(draws, 8), keys, 1.5, targets=torch.full((draws,), 2), backend=backend)
    logits = 1.5 * (query @ keys.T)[0].double()
    logits[2] = -torch.inf
    expected = logits.softmax(0)
    frequency = index.bincount(minlength=7) / draws
    assert frequency[2] == 0
    assert ((frequency - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt() + 1e-9).all()


@pytest.mark.parametrize("kernels", ["native", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_every_backend_draws_the_same(dtype, kernels):
    backends.need("contrastive", kernels, dtype)
    x, y = torch.randn(150, 24, dtype=torch.float64).to(dtype), torch.randn(700, 24, dtype=torch.float64).to(dtype)
    ids = torch.arange(150) % 30, torch.arange(700) % 30
    a, b = (drawn(5, x, y, 0.3, query_ids=ids[0], key_ids=ids[1], backend=name) for name in (kernels, "reference"))
    assert (a == b).float().mean() > 0.99  # except for rounding ties
    assert (ids[1][a] != ids[0]).all()
    assert torch.equal(a, drawn(5, x, y, 0.3, query_ids=ids[0], key_ids=ids[1], backend=kernels))
    assert not torch.equal(a, drawn(6, x, y, 0.3, query_ids=ids[0], key_ids=ids[1], backend=kernels))


def test_a_query_without_negatives(backend):
    x = torch.randn(3, 8)
    assert drawn(0, x, x, 1.0, query_ids=torch.tensor([4, 4, 4]), backend=backend).tolist() == [-1, -1, -1]
    assert drawn(0, x[:0], x, 1.0, backend=backend).tolist() == []
    assert drawn(0, x[:1], x[:1], 1.0, backend=backend).tolist() == [-1]


def test_torch_manual_seed_decides(backend):
    x, y = torch.randn(2, 40, 8).unbind()
    torch.manual_seed(3)
    first = sample_negatives(x, y, 0.1, backend=backend)
    torch.manual_seed(3)
    assert torch.equal(first, sample_negatives(x, y, 0.1, backend=backend))


def judge_topk(dtype, k, n, m, backend, device="cpu"):
    x, y = (torch.randn(rows, 20, dtype=torch.float64).to(device, dtype) for rows in (n, m))
    values, indices = topk_similar(x, y, k, backend=backend)
    truth = x.double() @ y.double().T
    with named.case(f"k = {k}"):
        torch.testing.assert_close(values.double(), truth.topk(k).values, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(truth.gather(1, indices), values.double(), rtol=1e-5, atol=1e-5)
        assert all(len(set(row)) == k for row in indices.tolist())


@pytest.mark.parametrize("backend", ["native", "reference"])
@backends.every_dtype
def test_topk(dtype, backend):
    backends.need("contrastive", backend, dtype)
    for k in (1, 7, 300):
        judge_topk(dtype, k, 101, 2300, backend)


# More than 128 takes several passes, and in float32 other tiles.
@pytest.mark.parametrize(
    ("dtype", "k", "n"),
    [
        *((torch.float16, 1, 101), (torch.bfloat16, 7, 101), (torch.float32, 7, 101)),
        *((torch.bfloat16, 300, 40), (torch.float32, 300, 40)),
    ],
    ids=str,
)
def test_topk_interpreted(dtype, k, n):
    backends.need("contrastive", "triton", dtype)
    judge_topk(dtype, k, n, 310, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_topk_on_a_gpu(dtype):
    backends.need("contrastive", "triton", dtype, "cuda")
    for k in (1, 7, 16, 17, 300):
        judge_topk(dtype, k, 101, 2300, "triton", "cuda")


def test_topk_ties_go_to_the_lower_index(backend):
    y = torch.ones(600, 4)
    y[450] = 2
    values, indices = topk_similar(torch.ones(2, 4), y, 5, backend=backend)
    assert indices.tolist() == [[450, 0, 1, 2, 3]] * 2
    assert values.tolist() == [[8, 4, 4, 4, 4]] * 2


def test_topk_of_nan(backend):
    y = torch.tensor([[torch.nan], [1.0], [torch.nan], [3.0]])
    values, indices = topk_similar(torch.ones(1, 1), y, 4, backend=backend)
    assert indices.tolist() == [[3, 1, 0, 2]]
    assert values.tolist() == [[3, 1, -torch.inf, -torch.inf]]


def test_mistakes_are_named():
    x = torch.randn(2, 3)
    topk, sample = partial(topk_similar, x, x), partial(sample_negatives, x, x, 1.0)
    beyond = torch.tensor([0, 2])
    named.mistakes(
        (partial(topk, 1.0), TypeError, "k: expected an integer"),
        *((partial(topk, k), ValueError, f"k: expected 1 to 2, the number of keys.*got {k}") for k in (0, 3, -1)),
        (partial(sample, generator=3), TypeError, r"generator: expected a torch\.Generator or None"),
        (partial(sample, targets=beyond), ValueError, "targets: expected indices of keys, 0 to 1"),
    )


def test_opcheck(backend):
    x, y = torch.randn(2, 9, 4).unbind()
    seed = torch.tensor([1, 2])
    args = (x, y, torch.tensor(1.0), seed, torch.arange(9), None, None, "positive", backend)
    torch.library.opcheck(torch.ops.mmkernels.contrastive_sample_fwd.default, args)
    torch.library.opcheck(torch.ops.mmkernels.contrastive_topk_fwd.default, (x, y, 3, backend))
