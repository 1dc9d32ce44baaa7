"""The log-sum-exp of each query's logits against the dense expression, on each backend."""

import functools

import backends
import named
import pytest
import torch
from derivatives import assert_differentiable_twice
from ops.contrastive.shared import IDS, N, inputs_of, rows
from torch import Tensor

from mmkernels import similarity_logsumexp
from mmkernels.testing import assert_as_accurate
from mmkernels.testing.contrastive import plain_similarity_logsumexp

backend = backends.fixture("contrastive")

M = 2 * N + 5
KEY_IDS = torch.cat([IDS, IDS.flip(0), torch.arange(5)])
OPTIONS = {
    "everything": dict(),
    "ids": dict(query_ids=IDS, key_ids=KEY_IDS),
    "hardness": dict(hardness=4.0, query_ids=IDS, key_ids=KEY_IDS),
    "a row sees nothing": dict(query_ids=torch.zeros(N).long(), key_ids=torch.zeros(M).long()),
}
WEIGHTS = rows(N, 1, 3)[:, 0] + 1.5


def weighed(function, x, y, scale, **options):
    """lse and gradients of a weighted sum of the finite ones."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, y, scale)]
    lse = function(*leaves, **options)
    finite = lse.detach() > -torch.inf
    total = (torch.where(finite, lse, 0.0) * WEIGHTS.to(lse.dtype)).sum()
    return lse.detach(), *torch.autograd.grad(total, leaves)


def cast(options, dtype):
    return {name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in options.items()}


@backends.every_dtype
def test_as_accurate_as_plain_pytorch(dtype, backend):
    backends.need("contrastive", backend, dtype)
    for name, options in OPTIONS.items():
        results = []
        for seed in range(3):
            inputs = inputs_of(M, dtype, seed)
            truth = weighed(plain_similarity_logsumexp, *(t.double() for t in inputs), **cast(options, torch.float64))
            ours = functools.partial(similarity_logsumexp, backend=backend)
            results.append([weighed(f, *inputs, **cast(options, dtype)) for f in (ours, plain_similarity_logsumexp)])
            results[-1].append(truth)
        for i, what in enumerate(("lse", "queries", "keys", "scale")):
            got, plain, truth = (torch.stack([draw[who][i] for draw in results]) for who in range(3))
            with named.case(name, what):
                if dtype == torch.float64:
                    torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-14)
                else:
                    # The row's largest logit is a term of its lse and may lose a float32 rounding in any product.
                    terms = truth.abs().nan_to_num(posinf=0) if what == "lse" else None
                    assert_as_accurate(what, got.float() if what == "lse" else got, plain, truth, terms=terms)


def test_a_row_that_sees_nothing_has_zero_gradients_whatever_follows(backend):
    x, y, scale = (t.requires_grad_() for t in inputs_of(N, torch.float32))
    ids = torch.zeros(N, dtype=torch.int64)
    some = torch.where(torch.arange(N) < 3, 1, ids)  # the first three queries see every key, the others none
    lse = similarity_logsumexp(x, y, scale, query_ids=some, key_ids=ids, backend=backend)
    assert (lse[3:] == -torch.inf).all()
    for joined in (torch.logaddexp(lse, lse), torch.stack([lse, lse, lse]).logsumexp(0)):
        dx, dy, dscale = torch.autograd.grad(joined.exp().sum(), (x, y, scale), retain_graph=True)
        assert not dx[3:].any()
        assert all(grad.isfinite().all() for grad in (dx, dy, dscale))
        assert dx[:3].any()


@pytest.mark.parametrize("name", OPTIONS)
def test_second_derivatives_and_forward_mode(name):
    n, m = 6, 9
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(k, 4, generator=generator, dtype=torch.float64).requires_grad_() for k in (n, m))
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    sizes = dict(query_ids=n, key_ids=m)
    options = {k: v[: sizes[k]] if k in sizes else v for k, v in OPTIONS[name].items()}

    def finite(*inputs):
        lse = similarity_logsumexp(*inputs, **options)
        return torch.where(lse > -torch.inf, lse, 0.0)

    if "hardness" not in options:  # whose finite differences do not see what its derivatives leave out
        assert_differentiable_twice(finite, x, y, scale)


def test_compiled_whole_and_functorch(backend):
    inputs = inputs_of(M, torch.float32)

    def total(x, y, scale):
        return similarity_logsumexp(x, y, scale, backend=backend, **OPTIONS["ids"]).sum()

    expected = torch.func.grad(total, argnums=(0, 1, 2))(*inputs)
    leaves = [t.clone().requires_grad_() for t in inputs]
    torch.compiler.reset()
    torch.compile(total, fullgraph=True, backend="aot_eager")(*leaves).backward()
    for leaf, want in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, want)


def test_layouts_sizes_and_autocast(backend):
    x, y, scale = inputs_of(M, torch.bfloat16)
    expected = similarity_logsumexp(x, y, scale, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(similarity_logsumexp(x, y, scale, backend=backend), expected)
    turned = (t.T.contiguous().T for t in (x, y))
    torch.testing.assert_close(similarity_logsumexp(*turned, scale, backend=backend), expected)
    for n, m in ((0, 4), (4, 0), (1, 1), (1, 300)):
        queries, keys = rows(n).float(), rows(m, seed=1).float()
        lse = similarity_logsumexp(queries, keys, 7.0, backend=backend)
        assert lse.dtype == torch.float64
        torch.testing.assert_close(lse, (7.0 * queries.double() @ keys.double().T).logsumexp(1), rtol=1e-6, atol=1e-6)


def test_extremes(backend):
    """Logits beyond float32's exp, of either sign; NaN and inf reach the result."""
    x, y = rows(20, 8).float(), rows(30, 8, 1).float()
    for scale in (1e4, -1e4, 0.0, 1e-30):
        truth = (scale * x.double() @ y.double().T).logsumexp(1)
        lse = similarity_logsumexp(x, y, scale, backend=backend)
        torch.testing.assert_close(lse, truth, rtol=1e-5, atol=1e-5)
    for bad in (torch.nan, torch.inf):
        broken = x.clone()
        broken[3, 2] = bad
        lse = similarity_logsumexp(broken, y, 5.0, backend=backend)
        assert not lse[3].isfinite()
        assert lse[:3].isfinite().all()
        assert lse[4:].isfinite().all()


X, Y = torch.randn(2, 4, 8).unbind()
FOUR = torch.arange(4)


def test_mistakes_are_named():
    lse = similarity_logsumexp
    named.mistakes(
        (lambda: lse(X[0], Y, 1.0), ValueError, r"queries: expected \[N, E\]"),
        (lambda: lse(X, Y.double(), 1.0), TypeError, "keys: expected float32 like queries"),
        (lambda: lse(X, Y, "1"), TypeError, "logit_scale: expected a number"),
        (lambda: lse(X, Y, 1.0, hardness=-1.0), ValueError, "hardness: expected a finite number, at least 0"),
        (lambda: lse(X, Y, -1.0, hardness=1.0), ValueError, "logit_scale: expected at least 0 with hardness"),
        (lambda: lse(X, Y, 1.0, key_ids=FOUR), ValueError, "query_ids: expected query ids, required with key_ids"),
        (lambda: lse(X, Y[:3], 1.0, query_ids=FOUR), ValueError, r"key_ids: expected \[3\] int64"),
        (lambda: lse(X, Y, 1.0, query_ids=FOUR.float()), TypeError, r"query_ids: expected \[4\] int64"),
    )
