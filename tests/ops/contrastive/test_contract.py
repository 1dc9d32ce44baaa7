"""The losses under opcheck, torch.compile, functorch, checkpointing and autocast; and user mistakes."""

import functools

import backends
import named
import pytest
import torch

from mmkernels import BackendError, infonce, siglip
from mmkernels.testing.contrastive import plain_infonce, plain_siglip

OPS = torch.ops.mmkernels


backend = backends.fixture("contrastive")


def leaves(n=10, e=16, dtype=torch.float32):
    queries, keys = torch.randn(2, n, e, dtype=dtype).unbind()
    return queries.requires_grad_(), keys.requires_grad_(), torch.tensor(2.0, requires_grad=True)


BIAS = torch.tensor(-1.0, requires_grad=True)


def test_opcheck(backend):
    queries, keys, scale = leaves()
    torch.library.opcheck(OPS.contrastive_infonce_fwd.default, (queries, keys, scale, backend))
    torch.library.opcheck(OPS.contrastive_siglip_fwd.default, (queries, keys, scale, BIAS, backend))
    grad, (x, y, s, b) = torch.tensor(1.5), (t.detach() for t in (queries, keys, scale, BIAS))
    infonce_args = grad, x, y, s, *OPS.contrastive_infonce_fwd(x, y, s, backend)[1:], True, True, backend
    siglip_args = grad, x, y, s, b, *OPS.contrastive_siglip_fwd(x, y, s, b, backend)[1:], True, False, backend
    for name, tangents, args in (("infonce", (x, None, s), infonce_args), ("siglip", (x, y, None, b), siglip_args)):
        torch.library.opcheck(getattr(OPS, f"contrastive_{name}_bwd").default, args)
        second = getattr(OPS, f"contrastive_{name}_second").default
        torch.library.opcheck(second, (*tangents, *args))
        torch.library.opcheck(second, (*tangents, None, *args[1:]))


def test_fullgraph_compile(backend):
    def loss(x, y, s):
        return infonce(x, y, s, backend=backend) + siglip(x, y, s, -1.0, backend=backend)

    for dynamic in (False, True):
        torch.compiler.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for n in (10, 13, 21) if dynamic else (10,):
            inputs = leaves(n)
            expected, got = loss(*inputs), compiled(*inputs)
            torch.testing.assert_close(got, expected)
            grads = (torch.autograd.grad(value, inputs) for value in (expected, got))
            for ours, theirs in zip(*grads, strict=True):
                torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
def test_inductor():
    inputs = leaves(33, 24)
    got = torch.compile(infonce, fullgraph=True)(*inputs)
    torch.testing.assert_close(got, plain_infonce(*inputs))


def test_functorch(backend):
    def loss(x, y, s):
        return infonce(x, y, s, backend=backend) + siglip(x, y, s, -1.0, backend=backend)

    queries, keys, scale = leaves()
    expected = torch.autograd.grad(loss(queries, keys, scale), (queries, keys, scale))
    got = torch.func.grad(loss, argnums=(0, 1, 2))(queries.detach(), keys.detach(), scale.detach())
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)
    batch = torch.randn(3, 10, 16)
    rows = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None, None))(batch, keys.detach(), scale.detach())
    for row, x in zip(rows, batch, strict=True):
        assert torch.equal(row, torch.func.grad(loss)(x, keys.detach(), scale.detach()))


def test_bare_ops_differentiate(backend):
    queries, keys, scale = leaves()
    OPS.contrastive_infonce_fwd(queries, keys, scale, backend)[0].backward()
    expected = torch.autograd.grad(infonce(queries, keys, scale, backend=backend), (queries, keys, scale))
    for leaf, grad in zip((queries, keys, scale), expected, strict=True):
        assert torch.equal(leaf.grad, grad)


def test_ops_that_hide_no_pair_refuse_to_ignore(backend):
    queries, keys, scale = (x.detach() for x in leaves())
    rules = None, torch.arange(10), torch.arange(10), "ignore", backend
    with pytest.raises(ValueError, match="same_id: expected 'positive', got 'ignore'"):
        OPS.contrastive_sigmoid_fwd(queries, keys, scale, BIAS.detach(), *rules)
    with pytest.raises(ValueError, match="same_id: expected 'positive', got 'ignore'"):
        OPS.contrastive_sample_fwd(queries, keys, scale, torch.zeros(2, dtype=torch.int64), *rules)


def test_checkpoint(backend):
    queries, keys, scale = leaves()
    expected = torch.autograd.grad(infonce(queries, keys, scale, backend=backend), queries)[0]
    named = functools.partial(infonce, backend=backend)
    loss = torch.utils.checkpoint.checkpoint(named, queries, keys, scale, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(loss, queries)[0], expected)


def test_only_the_gradients_asked_for(backend):
    queries, keys, scale = leaves()
    infonce(queries, keys.detach(), scale.detach(), backend=backend).backward()
    expected = torch.autograd.grad(plain_infonce(queries, keys, scale), queries)[0]
    torch.testing.assert_close(queries.grad, expected)
    assert keys.grad is None
    assert scale.grad is None


def test_upstream_gradient_scales_all(backend):
    inputs = (*leaves(), BIAS)
    once = torch.autograd.grad(siglip(*inputs, backend=backend), inputs)
    thrice = torch.autograd.grad(3 * siglip(*inputs, backend=backend), inputs)
    for one, three in zip(once, thrice, strict=True):
        torch.testing.assert_close(three, 3 * one)


def test_non_contiguous_rows_and_columns(backend):
    wide = torch.randn(20, 40)
    for x in (wide[::2, :16], wide.T[:10, :16], wide[:10, ::2][:, :16], wide[:1, :16].expand(10, 16)):
        y = torch.randn(10, 16)
        torch.testing.assert_close(infonce(x, y, 2.0, backend=backend), plain_infonce(x, y, torch.tensor(2.0)))
        grads = (_gradient(f, x, y) for f in (lambda *a: infonce(*a, backend=backend), plain_infonce))
        torch.testing.assert_close(*grads)


def _gradient(loss, x, y):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(loss(x, y, torch.tensor(2.0)), x)[0]


def test_no_rows(backend):
    queries, keys, scale = leaves(0)
    for loss in (infonce(queries, keys, scale, backend=backend), siglip(queries, keys, scale, 1.0, backend=backend)):
        grads = torch.autograd.grad(loss, (queries, keys, scale))
        assert loss.item() == 0
        assert [list(g.shape) for g in grads] == [[0, 16], [0, 16], []]
        assert grads[2].item() == 0


def test_features_of_no_width(backend):
    x = torch.empty(5, 0, requires_grad=True)
    assert infonce(x, x, 1.0, backend=backend).item() == pytest.approx(torch.tensor(5.0).log().item())


def test_what_is_not_finite_is_not_hidden(backend):
    queries, keys, scale = leaves()
    for bad in (torch.nan, torch.inf, -torch.inf):
        spoilt = queries.detach().clone()
        spoilt[3, 2] = bad
        spoilt.requires_grad_()
        for ours in (infonce(spoilt, keys, scale, backend=backend), siglip(spoilt, keys, scale, -1.0, backend=backend)):
            assert not torch.isfinite(ours) or not torch.isfinite(torch.autograd.grad(ours, spoilt)[0]).all(), bad


def test_scalars_in_every_form(backend):
    """Numbers, and one-element tensors, which get gradients in their own shape and dtype."""
    queries, keys, *_ = leaves()
    plain = [torch.tensor(value, requires_grad=True) for value in (2.0, -1.0)]
    for function, count in ((infonce, 1), (siglip, 2)):
        loss = functools.partial(function, queries, keys, backend=backend)
        expected = loss(*plain[:count])
        assert torch.equal(loss(*(2.0, -1.0)[:count]), expected)
        assert torch.equal(loss(*(2, -1)[:count]), expected)
        grads = torch.autograd.grad(expected, plain[:count])
        for shape, dtype in (
            ((), torch.float64),
            ((1,), torch.bfloat16),
            ((1, 1), torch.float32),
            ((1, 1, 1), torch.float32),
        ):
            given = [x.detach().to(dtype).reshape(shape).requires_grad_() for x in plain[:count]]
            assert torch.equal(loss(*given), expected)
            for scalar, got, want in zip(given, torch.autograd.grad(loss(*given), given), grads, strict=True):
                assert (got.shape, got.dtype) == (scalar.shape, scalar.dtype)
                assert torch.equal(got.reshape(()), want.to(got.dtype))


def test_autocast_changes_nothing(backend):
    inputs = leaves()
    outside = infonce(*inputs, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        inside = infonce(*inputs, backend=backend)
        pairs = siglip(*inputs, BIAS, backend=backend)
    assert torch.equal(inside, outside)
    torch.testing.assert_close(pairs, plain_siglip(*inputs, BIAS))
    assert torch.autograd.grad(inside, inputs[0])[0].dtype == torch.float32


X, Y = torch.randn(2, 4, 8).unbind()
BAD = [
    (dict(queries=[1.0]), TypeError, r"queries: expected \[N, E\] floating point, got \[1.0\] \(list\)"),
    (dict(queries=torch.zeros(3, 4, 5)), ValueError, r"queries: expected \[N, E\] floating point, got \[3, 4, 5\]"),
    (dict(queries=torch.zeros(4, 8, dtype=torch.int64)), TypeError, r"queries: .*got \[4, 8\] int64 on cpu"),
    (dict(keys=Y.double()), TypeError, "keys: expected float32 like queries, got .*float64"),
    (dict(keys=Y[:, :7]), ValueError, r"keys: expected \[M, 8\], as wide as queries, got \[4, 7\]"),
    (dict(keys=Y[:3]), ValueError, r"keys: expected \[4, E\], one per query"),
    (dict(keys=Y.to("meta")), ValueError, "keys: expected .* on cpu, got .* on meta"),
    (dict(logit_scale="14"), TypeError, "logit_scale: expected a number or a floating-point tensor of one element"),
    (dict(logit_scale=torch.ones(2)), ValueError, "logit_scale: expected a number or .* of one element"),
    (dict(logit_scale=torch.tensor(1)), TypeError, "logit_scale: .*int64"),
    (dict(deterministic=1), TypeError, "deterministic: expected None, True or False"),
    (dict(backend="cuda"), ValueError, "backend: expected None or one of native, triton, reference, got 'cuda'"),
]


@pytest.mark.parametrize("loss", [infonce, functools.partial(siglip, logit_bias=0.0)], ids=["infonce", "siglip"])
def test_a_mistake_is_named(loss):
    right = dict(queries=X, keys=Y, logit_scale=1.0)
    named.mistakes(*((functools.partial(loss, **(right | wrong)), *expected) for wrong, *expected in BAD))


def test_a_wrong_bias_is_named():
    with pytest.raises(TypeError, match="logit_bias: expected a number or a floating-point tensor of one element"):
        siglip(X, Y, 1.0, None)


def test_a_backend_that_cannot_serve_says_why():
    with pytest.raises(BackendError, match=r"(?s)backend='triton' does not support.*not float64.*reference: supported"):
        infonce(X.double(), Y.double(), 1.0, backend="triton")
