"""Attention as torch sees it (opcheck, compile, functorch, autocast) and as a user errs with it."""

import pytest
import torch
import torch.nn.functional as F

from mmkernels import AttentionMask, BackendError, attention
from mmkernels.runtime.backends import candidates
from mmkernels.testing.attention import cu_seqlens, make_inputs

OPS = torch.ops.mmkernels
LENGTHS = (3, 0, 6, 1)
MASK = AttentionMask.packed(cu_seqlens(LENGTHS), causal=True)


@pytest.fixture(params=["native", "reference"])
def backend(request) -> str:
    reason = candidates("attention", torch.device("cpu"), torch.float32)[request.param]
    if reason is not None:
        pytest.skip(reason)
    return request.param


def leaves(tokens=10, heads=4, kv_heads=2, dim=8):
    x = make_inputs(tokens, tokens, heads=heads, kv_heads=kv_heads, dim=dim)
    return [t.requires_grad_() for t in (x.q, x.k, x.v)]


def test_opcheck(backend):
    rows = MASK.rows(10, 10)
    torch.library.opcheck(OPS.attention_fwd.default, (*leaves(), *rows, 0.3, backend))
    q, k, v = (x.detach() for x in leaves())
    out, lse = OPS.attention_fwd(q, k, v, *rows, 0.3, backend)
    grads = torch.randn_like(out), torch.randn_like(lse)
    torch.library.opcheck(OPS.attention_bwd.default, (*grads, q, k, v, out, lse, *rows, 0.3, backend))
    torch.library.opcheck(OPS.attention_bwd.default, (grads[0], None, q, k, v, out, lse, *rows, 0.3, backend))


@pytest.mark.parametrize("mask_in_graph", [False, True])
def test_fullgraph_compile(backend, mask_in_graph):
    boundaries = cu_seqlens(LENGTHS)

    def loss(q, k, v):
        mask = AttentionMask.packed(boundaries, causal=True) if mask_in_graph else MASK
        out, lse = attention(q, k, v, mask, return_lse=True, backend=backend)
        return out.square().sum() + lse.sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = leaves()
    expected, got = (torch.autograd.grad(f(*inputs), inputs) for f in (loss, compiled))
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
def test_inductor():
    q, k, v = leaves()
    got = torch.compile(lambda q, k, v: attention(q, k, v, MASK), fullgraph=True)(q, k, v)
    torch.testing.assert_close(got, attention(q, k, v, MASK))


def test_functorch(backend):
    def loss(q, k, v):
        out, lse = attention(q, k, v, MASK, return_lse=True, backend=backend)
        return out.square().sum() + lse.sum()

    q, k, v = leaves()
    expected = torch.autograd.grad(loss(q, k, v), (q, k, v))
    got = torch.func.grad(loss, argnums=(0, 1, 2))(q.detach(), k.detach(), v.detach())
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)
    batch = torch.randn(3, *q.shape)
    rows = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None, None))(batch, k.detach(), v.detach())
    for row, one in zip(rows, batch, strict=True):
        assert torch.equal(row, torch.func.grad(loss)(one, k.detach(), v.detach()))


def test_bare_op_and_checkpoint(backend):
    q, k, v = leaves()
    expected = torch.autograd.grad(attention(q, k, v, MASK, backend=backend).sum(), q)[0]
    bare = OPS.attention_fwd(q, k, v, *MASK.rows(10, 10), 8**-0.5, backend)[0]
    assert torch.equal(torch.autograd.grad(bare.sum(), q)[0], expected)
    again = torch.utils.checkpoint.checkpoint(attention, q, k, v, MASK, backend=backend, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again.sum(), q)[0], expected)


def test_only_lse_used(backend):
    q, k, v = leaves()
    lse = attention(q, k, v, MASK, return_lse=True, backend=backend)[1]
    dq, dk, dv = torch.autograd.grad(lse.sum(), (q, k, v))
    assert dq.abs().sum() > 0
    assert dk.abs().sum() > 0
    assert not dv.any()


def test_batched_equals_sample_by_sample(backend):
    q, k, v = (torch.randn(3, tokens, heads, 8) for tokens, heads in ((5, 4), (7, 2), (7, 2)))
    out, lse = attention(q, k, v, return_lse=True, backend=backend)
    assert out.shape == (3, 5, 4, 8)
    assert lse.shape == (3, 4, 5)
    for b in range(3):
        one, one_lse = attention(q[b], k[b], v[b], return_lse=True, backend=backend)
        torch.testing.assert_close(out[b], one)
        torch.testing.assert_close(lse[b], one_lse)


def test_a_query_that_sees_nothing(backend):
    mask = AttentionMask.packed(cu_seqlens((2, 3)), cu_seqlens((0, 4)))
    q, k, v = (torch.randn(tokens, 2, 8, requires_grad=True) for tokens in (5, 4, 4))
    out, lse = attention(q, k, v, mask, return_lse=True, backend=backend)
    assert not out[:2].any()
    assert (lse[:, :2] == -torch.inf).all()
    dq, dk, dv = torch.autograd.grad(out.sum() + lse[:, 2:].sum(), (q, k, v))
    assert not dq[:2].any()
    assert torch.isfinite(dk).all()
    assert torch.isfinite(dv).all()


@pytest.mark.parametrize("tokens", [(0, 0), (0, 3), (3, 0)])
def test_empty(backend, tokens):
    q, k, v = (torch.randn(t, 2, 8, requires_grad=True) for t in (tokens[0], tokens[1], tokens[1]))
    out = attention(q, k, v, backend=backend)
    assert out.shape == (tokens[0], 2, 8)
    assert not out.any()
    for grad, x in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v), strict=True):
        assert grad.shape == x.shape
        assert not grad.any()


def test_non_contiguous(backend):
    wide = torch.randn(10, 3, 4, 16)
    q, _, v = wide[..., :8].unbind(1)  # the usual fused projection
    columns = torch.randn(10, 4, 16)[..., ::2]
    torch.testing.assert_close(
        attention(q, columns, v, MASK, backend=backend),
        attention(q.contiguous(), columns.contiguous(), v.contiguous(), MASK, backend=backend),
    )


def test_samples_do_not_see_each_other(backend):
    q, k, v = (x.detach() for x in leaves())
    mask = AttentionMask.packed(cu_seqlens(LENGTHS))
    before = attention(q, k, v, mask, backend=backend)
    k[3:9], v[3:9], q[3:9] = 1e4, 1e30, 7
    after = attention(q, k, v, mask, backend=backend)
    assert torch.equal(before[:3], after[:3])
    assert torch.equal(before[9:], after[9:])
    assert not torch.equal(before[3:9], after[3:9])


def test_autocast_as_sdpa():
    q, k, v = (x.detach() for x in leaves(kv_heads=4))
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(q, k, v).dtype == F.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16


Q, K, V = (torch.randn(5, heads, 8) for heads in (4, 2, 2))
BAD = [
    (dict(q=None), TypeError, r"q: expected \[Tq, H, D\] or \[B, Tq, H, D\] floating point, got None"),
    (dict(q=torch.zeros(5, 8)), ValueError, r"q: expected .*got \[5, 8\] float32"),
    (dict(q=torch.zeros(5, 4, 8, dtype=torch.int32)), TypeError, "q: expected .* floating point, got .*int32"),
    (dict(k=K.double()), TypeError, r"k: expected \[Tk, Hkv, D\] float32, got .*float64"),
    (dict(k=K[..., :7]), ValueError, "k: expected head dim D=8 like q"),
    (dict(k=torch.randn(5, 3, 8)), ValueError, "k: expected a number of heads Hkv that divides q's 4"),
    (dict(v=V[:4]), ValueError, r"v: expected \[5, 2, 'Dv'\] like k"),
    (dict(mask=torch.ones(5, 5)), TypeError, "mask: expected an AttentionMask or None"),
    (dict(mask=MASK), ValueError, "cu_seqlens_q: expected at most 5 tokens|mask: expected q and k of"),
    (dict(scale="1"), TypeError, "scale: expected a float or None, got '1'"),
    (dict(scale=float("nan")), ValueError, "scale: expected a finite number"),
    (dict(return_lse=1), TypeError, "return_lse: expected a bool"),
    (dict(deterministic="yes"), TypeError, "deterministic: expected None, True or False"),
    (dict(backend="cudnn"), ValueError, "backend: expected None or one of native, triton, reference"),
    (dict(pair_bias=torch.zeros(4, 1, 1)), NotImplementedError, "pair_bias: not supported yet"),
    (dict(sink=torch.zeros(4)), NotImplementedError, "sink: not supported yet"),
    (dict(dropout_p=0.1), NotImplementedError, "dropout_p: not supported yet"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), BAD)
def test_a_mistake_is_named(wrong, error, message):
    with pytest.raises(error, match=message):
        attention(**(dict(q=Q, k=K, v=V) | wrong))


def test_a_backend_that_cannot_serve_says_why():
    x = torch.randn(3, 1, 300)
    with pytest.raises(BackendError, match=r"(?s)backend='triton' cannot serve.*reference: can serve"):
        attention(x.double(), x.double(), x.double(), backend="triton")
