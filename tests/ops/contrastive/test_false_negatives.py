"""The filter of false negatives against the dense expression: thresholds, ties, both directions, every kind of key."""

import functools

import backends
import named
import pytest
import torch
from derivatives import assert_differentiable_twice
from ops.contrastive.shared import IDS, E, N, inputs_of, rows
from ops.contrastive.test_options import OWN, SHUFFLED, WEIGHTS, terms_of
from torch import Tensor

from mmkernels import FalseNegatives, infonce, similarity_logsumexp
from mmkernels.testing import assert_as_accurate
from mmkernels.testing.contrastive import loss_and_gradients, plain_infonce_options, plain_similarity_logsumexp

backend = backends.fixture("contrastive")


def whole(*shape, seed):
    """Small integers, whose products are exact in every dtype: many ties, and the same decision everywhere."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).double()


def filtered(m=N, *, negatives=None, **options):
    return FalseNegatives(whole(N, 7, seed=1), whole(m, 7, seed=2), guide_negatives=negatives, **options)


MANY, GUIDE_OWN = rows(70, E, 8), whole(N, 7, 7, seed=3)

# name -> (number of keys, options)
OPTIONS = {
    "both ways": (N, dict(false_negatives=filtered())),
    "margin": (N, dict(false_negatives=filtered(margin=2.0))),
    "negative margin, one way": (N, dict(false_negatives=filtered(margin=-3.0), symmetric=False)),
    "relative": (N, dict(false_negatives=filtered(margin=0.25, kind="relative"))),
    "shuffled, weights": (N, dict(false_negatives=filtered(), targets=SHUFFLED, weights=WEIGHTS)),
    "more keys": (2 * N + 5, dict(false_negatives=filtered(2 * N + 5), symmetric=False)),
    "ignored": (N, dict(false_negatives=filtered(), query_ids=IDS, same_id="ignore")),
    "negatives": (N, dict(false_negatives=filtered(negatives=whole(70, 7, seed=4)), negatives=MANY)),
    "own negatives": (N, dict(false_negatives=filtered(negatives=GUIDE_OWN, margin=1.0), negatives=OWN)),
    "decoupled": (N, dict(false_negatives=filtered(), decoupled=True)),
    "decoupled, everything": (
        N,
        dict(
            false_negatives=filtered(negatives=GUIDE_OWN, margin=4.0),
            negatives=OWN,
            query_ids=IDS,
            same_id="ignore",
            weights=WEIGHTS,
            decoupled=True,
        ),
    ),
    "hardness": (
        N,
        dict(false_negatives=filtered(negatives=GUIDE_OWN, margin=2.0), negatives=OWN, hardness=3.0, targets=SHUFFLED),
    ),
    "nothing but the target": (
        N,
        dict(false_negatives=filtered(margin=1e3, negatives=whole(70, 7, seed=4)), negatives=MANY),
    ),
}


def cast(options, dtype):
    def converted(value):
        if isinstance(value, FalseNegatives):
            return FalseNegatives(*(x.to(dtype) if isinstance(x, Tensor) else x for x in value))
        return value.to(dtype) if isinstance(value, Tensor) and value.ndim >= 2 else value

    return {name: converted(value) for name, value in options.items()}


def judge(name, dtype, backend, seeds=4):
    m, options = OPTIONS[name]
    ours = functools.partial(infonce, backend=backend, **cast(options, dtype))
    plain = functools.partial(plain_infonce_options, **cast(options, dtype))
    wide = functools.partial(plain_infonce_options, **cast(cast(options, dtype), torch.float64))
    results = []
    for seed in range(seeds):
        inputs = inputs_of(m, dtype, seed)
        truth = loss_and_gradients(wide, *(x.double() for x in inputs))
        results.append((*(loss_and_gradients(f, *inputs) for f in (ours, plain)), truth, terms_of(*inputs)))
    for i, what in enumerate(("loss", "queries", "keys", "logit_scale")):
        got, expected, true = (torch.stack([draw[who][i] for draw in results]) for who in range(3))
        terms = None if true.ndim > 1 else torch.stack([draw[3][i] for draw in results])
        assert_as_accurate(f"{name}: {what}", got, expected, true, terms=terms)


LOW = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_native(dtype):
    backends.need("contrastive", "native", dtype)
    for name in OPTIONS:
        with named.case(name):
            judge(name, dtype, "native")


INTERPRETED = [
    *(("both ways", torch.float32), ("relative", torch.bfloat16), ("shuffled, weights", torch.float16)),
    *(("ignored", torch.float32), ("negatives", torch.float32), ("own negatives", torch.bfloat16)),
    *(("decoupled, everything", torch.float32), ("nothing but the target", torch.float16)),
]


@pytest.mark.parametrize(("name", "dtype"), INTERPRETED, ids=str)
def test_triton_interpreted(name, dtype):
    backends.need("contrastive", "triton", dtype)
    judge(name, dtype, "triton", seeds=2)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_float64_is_the_oracle(backend):
    for name, (m, options) in OPTIONS.items():
        inputs = inputs_of(m, torch.float64)
        ours = loss_and_gradients(functools.partial(infonce, backend=backend, **options), *inputs)
        truth = loss_and_gradients(functools.partial(plain_infonce_options, **options), *inputs)
        for what, got, expected in zip(("loss", "queries", "keys", "scale"), ours, truth, strict=True):
            with named.case(name, what):
                torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_a_copy_of_the_target_stays(dtype, backend):
    """Keys with the same features, of any position and kind, are as similar as the target: bit for bit."""
    backends.need("contrastive", backend, dtype)
    n, m, kinds = 100, 330, 40
    x, y = rows(n).to(dtype), rows(m, seed=1).to(dtype)
    generator = torch.Generator().manual_seed(5)
    kind, kind_of_own = (torch.randint(kinds, shape, generator=generator) for shape in ((m,), (n, 5)))
    kind_of_own[:, 0] = kind[:n]
    features, guide_queries = rows(kinds, 50, 2).to(dtype), rows(n, 50, 3).to(dtype)
    similar = guide_queries.double() @ features.double().T
    similarity, of_own = similar[:, kind], similar.gather(1, kind_of_own)
    own = rows(n * 5, E, 4).to(dtype).view(n, 5, E)
    guide = FalseNegatives(guide_queries, features[kind], guide_negatives=features[kind_of_own])
    loss = infonce(x, y, 9.0, negatives=own, false_negatives=guide, symmetric=False, backend=backend)
    logits = torch.cat([9.0 * x.double() @ y.double().T, 9.0 * (own.double() @ x.double()[:, :, None])[:, :, 0]], 1)
    above = torch.cat([similarity, of_own], 1) > similarity.diagonal()[:, None]
    assert ((torch.cat([similarity, of_own], 1) == similarity.diagonal()[:, None]).sum(1) > 2).all()
    truth = logits.masked_fill(above, -torch.inf).logsumexp(1) - logits.diagonal()
    torch.testing.assert_close(loss.double(), truth.mean(), rtol=1e-5, atol=1e-5)


def test_what_is_filtered_gets_no_gradient(backend):
    x, y, scale = inputs_of(N, torch.float32)
    away, queries = whole(N, 7, seed=2).float(), torch.ones(N, 7)
    away[5] = 50  # above every threshold but that of its own query
    guide = FalseNegatives(queries, away)
    leaf = y.clone().requires_grad_()
    options = dict(symmetric=False, false_negatives=guide, backend=backend)
    (grad,) = torch.autograd.grad(infonce(x, leaf, scale, **options), leaf)
    alone = torch.zeros(N)
    alone[5] = 1
    leaf = y.clone().requires_grad_()
    (own,) = torch.autograd.grad(infonce(x, leaf, scale, weights=alone, **options) / N, leaf)
    torch.testing.assert_close(grad[5], own[5], rtol=1e-4, atol=1e-7)
    for features in guide[:2]:
        features.requires_grad_()
    loss = infonce(x, y.clone().requires_grad_(), scale, **options)
    loss.backward()
    assert queries.grad is None
    assert away.grad is None


def test_second_derivatives_and_forward_mode():
    n, generator = 7, torch.Generator().manual_seed(2)

    def drawn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, y, own = (drawn(*shape).requires_grad_() for shape in ((n, 4), (n, 4), (n, 2, 4)))
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    guide = FalseNegatives(drawn(n, 3), drawn(n, 3), 0.1, guide_negatives=drawn(n, 2, 3))
    ids = dict(query_ids=torch.tensor([0, 1, 0, 2, 1, 3, 0]), same_id="ignore")
    for options in (dict(), dict(decoupled=True, symmetric=False), ids):

        def loss(x, y, scale, own, options=options):
            return infonce(x, y, scale, negatives=own, false_negatives=guide, **options)

        assert_differentiable_twice(loss, x, y, scale, own)


def test_compiled_whole_and_functorch(backend):
    m, options = OPTIONS["own negatives"]
    options, inputs = cast(options, torch.float32), inputs_of(m, torch.float32)
    loss = functools.partial(infonce, backend=backend, **options)
    expected = loss_and_gradients(loss, *inputs)
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, want in zip(loss_and_gradients(compiled, *inputs), expected, strict=True):
        torch.testing.assert_close(got, want)
    for got, want in zip(torch.func.grad(loss, argnums=(0, 1, 2))(*inputs), expected[1:], strict=True):
        torch.testing.assert_close(got, want)


def test_compiled_for_every_size():
    torch.compiler.reset()

    def loss(x, y, u, v):
        return infonce(x, y, 7.0, false_negatives=FalseNegatives(u, v, 0.1))

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (9, 7):
        inputs = torch.randn(4, size, 6).unbind()
        torch.testing.assert_close(compiled(*inputs), loss(*inputs))


def test_few_rows(backend):
    for n, k in ((0, 0), (0, 3), (1, 0), (1, 3)):
        x, y, own = (torch.randn(shape, requires_grad=True) for shape in ((n, 6), (n, 6), (n, k, 6)))
        guide = FalseNegatives(torch.randn(n, 2), torch.randn(n, 2), 100.0, guide_negatives=torch.randn(n, k, 2))
        for decoupled in (False, True):
            options = dict(negatives=own, false_negatives=guide, decoupled=decoupled, backend=backend)
            loss = infonce(x, y, 3.0, **options)
            assert loss.item() == pytest.approx(0, abs=1e-6)
            assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (x, y)))


def test_the_parts_of_other_losses(backend):
    """similarity_logsumexp with thresholds, where rows see some, all or none of the keys; NaN is not above."""
    x, y, scale = inputs_of(2 * N, torch.float32)
    guide = whole(N, 7, seed=1).float(), whole(2 * N, 7, seed=2).float()
    levels = torch.linspace(-60, 30, N)
    levels[7] = torch.nan
    options = dict(guide=guide, thresholds=levels, query_ids=IDS, key_ids=torch.cat([IDS, IDS]))
    lse = similarity_logsumexp(x, y, scale, backend=backend, **options)
    truth = plain_similarity_logsumexp(x.double(), y.double(), scale.double(), **cast(options, torch.float64))
    assert truth[0] == -torch.inf
    assert truth[7].isfinite()
    torch.testing.assert_close(lse, truth, rtol=1e-6, atol=1e-6)
    leaves = [t.clone().requires_grad_() for t in (x, y)]
    lse = similarity_logsumexp(*leaves, scale, backend=backend, **options)
    grads = torch.autograd.grad(torch.logaddexp(lse, lse).exp().sum(), leaves)
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][0].any()


@pytest.mark.parametrize("kind", ["absolute", "relative"])
def test_a_rule_instead_of_thresholds(backend, kind):
    """Keys that are the same to the guide as the target, bit for bit, are seen, wherever they are."""
    x, y, scale = inputs_of(2 * N, torch.float32)
    guide_queries, own = whole(N, 7, seed=1).float(), torch.randn(N, 7) / 3
    copies = own.repeat(2, 1)
    rule = FalseNegatives(guide_queries, own, kind=kind)
    similar = guide_queries @ own.T
    own_similarity = similar.diagonal()[:, None]
    above = (similar > own_similarity + 1e-5).repeat(1, 2)
    tied = torch.eye(N, dtype=torch.bool).repeat(1, 2)
    assert ((similar - own_similarity).abs() > 2e-5).repeat(1, 2)[~tied].all()  # nothing else is close to a tie
    lse = similarity_logsumexp(x, y, scale, guide=(guide_queries, copies), thresholds=rule, backend=backend)
    logits = (scale.double() * (x.double() @ y.double().T)).masked_fill(above & ~tied, -torch.inf)
    torch.testing.assert_close(lse, logits.logsumexp(1), rtol=1e-6, atol=1e-6)


X, Y = torch.randn(2, 4, 8).unbind()
FOUR = torch.arange(4)
GUIDE = FalseNegatives(torch.randn(4, 3), torch.randn(4, 3))


def test_mistakes_are_named():
    def call(guide=GUIDE, **options):
        return lambda: infonce(X, Y, 1.0, false_negatives=guide, **options)

    def lse(**options):
        return lambda: similarity_logsumexp(X, Y, 1.0, **options)

    three, features = torch.randn(4, 3), (GUIDE.guide_queries, GUIDE.guide_keys)
    named.mistakes(
        (call((X, Y)), TypeError, "false_negatives: expected None, or an mmkernels.FalseNegatives"),
        (call(label_smoothing=0.1), ValueError, "label_smoothing: expected to be left out with false_negatives"),
        (call(teacher=(X, Y, 0.1)), ValueError, "teacher: expected to be left out with false_negatives"),
        (call(return_stats=True), ValueError, "return_stats: expected to be left out with false_negatives"),
        (call(query_ids=FOUR), ValueError, "same_id: expected 'ignore' with false_negatives and ids"),
        (call(GUIDE._replace(margin="1")), TypeError, "false_negatives.margin: expected a finite number"),
        (call(GUIDE._replace(margin=torch.inf)), ValueError, "false_negatives.margin: expected a finite number"),
        (call(GUIDE._replace(kind="rel")), ValueError, "false_negatives.kind: expected 'absolute' or 'relative'"),
        (call(GUIDE._replace(guide_queries=X[:3])), ValueError, r"guide_queries: expected \[4, F\] float32"),
        (call(GUIDE._replace(guide_keys=X)), ValueError, r"guide_keys: expected \[4, 3\] float32"),
        (call(GUIDE._replace(guide_keys=three.double())), TypeError, r"guide_keys: expected \[4, 3\] float32"),
        (call(negatives=X), ValueError, "guide_negatives: expected the guide's features of the negatives"),
        (call(GUIDE._replace(guide_negatives=three)), ValueError, "guide_negatives: expected None without negatives"),
        (
            call(GUIDE._replace(guide_negatives=three), negatives=X[:, None]),
            ValueError,
            r"guide_negatives: expected \[4, 1, 3\] float32",
        ),
        (lse(thresholds=torch.ones(4)), ValueError, "guide: expected .guide_queries, guide_keys., required with"),
        (lse(guide=features), TypeError, r"thresholds: expected \[4\] floating point"),
        (lse(guide=features, thresholds=torch.ones(3)), ValueError, r"thresholds: expected \[4\] floating point"),
        (
            lse(guide=features, thresholds=GUIDE._replace(kind="x")),
            ValueError,
            "thresholds.kind: expected 'absolute' or",
        ),
        (
            lse(guide=features, thresholds=GUIDE._replace(guide_keys=X)),
            ValueError,
            r"thresholds.guide_keys: expected \[",
        ),
        (
            lse(guide=features, thresholds=GUIDE._replace(guide_negatives=three)),
            ValueError,
            "thresholds.guide_negatives: expected None",
        ),
        (lse(thresholds=GUIDE), ValueError, "guide: expected .guide_queries, guide_keys., required with"),
        (lse(guide=three, thresholds=torch.ones(4)), TypeError, r"guide: expected \(guide_queries, guide_keys\)"),
        (lse(guide=(X[:3], X), thresholds=torch.ones(4)), ValueError, r"guide.guide_queries: expected \[4, F\]"),
    )
