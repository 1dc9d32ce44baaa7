"""The largest scaled product of each head, before all other terms."""

import itertools
import math
from dataclasses import replace

import backends
import named
import pytest
import torch

from mmkernels import AttentionMask, attention
from mmkernels.testing.attention import MASKS, dense_mask, make_inputs

# Masks and options: plain rows; rows that are rewritten by a pattern, a bias, a cap, distances; a negative scale.
CASES = {
    "dense": {},
    "cross_causal": {"scale": -0.3},
    "packed": {"sink": True},
    "window_both": {"softcap": 1.0, "alibi": True},
    "image_spans": {"classes": (2, 2), "scale": -0.2, "dropout_p": 0.3},
    "cross_only": {"classes": (2, 2), "sink": True},
    "padding": {"scale": -1.0},
}


def expected(x, seen):
    scale = x.q.shape[-1] ** -0.5 if x.scale is None else x.scale
    k = x.k.double().repeat_interleave(x.q.shape[1] // x.k.shape[1], 1)
    products = torch.einsum("qhd,khd->hqk", x.q.double(), k) * scale
    return products.masked_fill(~seen, -torch.inf).amax((1, 2))


@backends.every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_value(dtype, backend):
    backends.need("attention", backend, dtype)
    for name, options in CASES.items():
        if backends.interpreted(backend) and dtype != torch.float32 and name not in ("dense", "cross_only"):
            continue  # the interpreter is slow
        case = MASKS[name]
        x = make_inputs(*case.tokens, heads=4, kv_heads=2, dim=24, dtype=dtype, mask=case.mask(), **options)
        given = {"scale": x.scale, "softcap": x.softcap, "alibi_slopes": x.alibi_slopes, "dropout_p": x.dropout_p}
        given |= {"pair_bias": x.pair_bias, "sink": x.sink, "backend": backend}
        torch.manual_seed(0)
        out, lse, largest = attention(x.q, x.k, x.v, x.mask, return_lse=True, return_max_logit=True, **given)
        assert largest.shape == (4,)
        assert largest.dtype == lse.dtype
        torch.testing.assert_close(largest.double(), expected(x, dense_mask(x)), rtol=2e-5, atol=1e-6)
        torch.manual_seed(0)
        plain = attention(x.q, x.k, x.v, x.mask, return_lse=True, **given)
        assert torch.equal(out, plain[0]), name  # the same bits
        assert torch.equal(lse, plain[1]), name


# What one element of a token becomes, and where among the tokens it is.
ODD = ((torch.nan, 0.0), (torch.nan, 0.5), (torch.nan, 1.0), (torch.inf, 0.5), (-torch.inf, 1.0))


@backends.every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_and_inf(dtype, backend):
    """As torch.amax: NaN where a visible product is, inf is a number. What is hidden does not count."""
    backends.need("attention", backend, dtype)
    found = set()
    for name in ("dense", "packed", "image_spans", "cross_only", "padding", "window_both"):
        if backends.interpreted(backend) and dtype != torch.float32 and name not in ("packed", "padding"):
            continue  # the interpreter is slow
        case = MASKS[name]
        x = make_inputs(*case.tokens, heads=4, kv_heads=2, dim=24, dtype=dtype, mask=case.mask(), **CASES[name])
        given = {"scale": x.scale, "softcap": x.softcap, "alibi_slopes": x.alibi_slopes, "dropout_p": x.dropout_p}
        given |= {"pair_bias": x.pair_bias, "sink": x.sink, "backend": backend}
        for (value, at), which in itertools.product(ODD[1::3] if backends.interpreted(backend) else ODD, "qk"):
            odd = getattr(x, which).clone()
            odd[int(at * (len(odd) - 1)), 1, 5] = value
            y = replace(x, **{which: odd})
            largest = attention(y.q, y.k, y.v, y.mask, return_max_logit=True, **given)[-1]
            with named.case(name, which, value, at):
                want = expected(y, dense_mask(y))
                torch.testing.assert_close(largest.double(), want, rtol=2e-5, atol=1e-6, equal_nan=True)
                assert largest[0].isfinite()
            found |= {str(top) for top in largest.tolist() if not math.isfinite(top)}
    assert "nan" in found
    assert "inf" in found or backends.interpreted(backend)


@backends.every
def test_nothing_seen_and_no_tokens(backend):
    backends.need("attention", backend)
    q, k = torch.randn(3, 2, 8), torch.randn(4, 2, 8)
    mask = AttentionMask.from_padding(torch.zeros(1, 3).bool(), torch.ones(1, 4).bool())
    for options in ({}, {"softcap": 2.0}):
        assert (attention(q, k, k, mask, return_max_logit=True, backend=backend, **options)[1] == -torch.inf).all()
        for queries, keys in ((q[:0], k), (q, k[:0]), (q[:0], k[:0])):
            out, largest = attention(queries, keys, keys, return_max_logit=True, backend=backend, **options)
            assert out.shape == queries.shape
            assert largest.tolist() == [-torch.inf, -torch.inf]


def test_batched_and_without_a_gradient():
    q, k = torch.randn(2, 3, 4, 8, requires_grad=True), torch.randn(2, 5, 2, 8)
    out, largest = attention(q, k, k, return_max_logit=True)
    assert not largest.requires_grad
    assert largest.shape == (4,)
    each = [attention(q[b], k[b], k[b], return_max_logit=True)[1] for b in range(2)]
    assert torch.equal(largest, torch.maximum(*each))
    torch.autograd.grad(out.sum(), q)
    moved = torch.func.jvp(lambda q: attention(q, k, k, return_max_logit=True)[0], (q.detach(),), (q.detach(),))
    assert moved[1].shape == out.shape


def test_compiles():
    q, k = torch.randn(3, 4, 8), torch.randn(5, 2, 8)
    compiled = torch.compile(lambda q: attention(q, k, k, return_max_logit=True), fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(q), attention(q, k, k, return_max_logit=True), strict=True):
        torch.testing.assert_close(ours, theirs)
