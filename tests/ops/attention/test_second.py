"""Second derivatives and forward mode of attention and its parts: right on every backend, and in blocks."""

import functools
import itertools
import random
from dataclasses import replace

import backends
import pytest
import torch
from derivatives import assert_differentiable_twice

from mmkernels import AttentionMask, additive_attention, attention, gated_residual, norm_rope, qk_norm_rope
from mmkernels.ops.attention import second
from mmkernels.testing import assert_as_accurate
from mmkernels.testing.attention import MASKS, AttentionInputs, capped, dense_mask, make_inputs

T, H, D = 12, 4, 3
CU = torch.tensor([0, 3, 3, 9, T], dtype=torch.int32)
MODALITIES = torch.tensor([0, 1, 1, 0, 1, 1, 0, 0, 1, 0, 0, 1], dtype=torch.uint8)
SPANS = torch.tensor([-1, 0, 0, -1, 1, 1, -1, -1, 2, -1, -1, 3], dtype=torch.int32)
BLOCKS = (2**20, 64)  # scores per block: all in one block, and several blocks
DTYPES = (torch.float32, torch.bfloat16)
KINDS = ("none", "packed", "causal", "multimodal", "prefix", "cross_only", "rows")


def leaf(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + len(shape) + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def random_mask(kind, draw):
    """A mask, and whether it has classes."""
    window = draw.choice([None, 1, 2])
    if kind == "none":
        return None, False
    if kind == "multimodal":
        return AttentionMask.multimodal(CU, MODALITIES, SPANS, window=window), True
    if kind == "cross_only":
        return AttentionMask.cross_only(CU, MODALITIES), True
    if kind == "prefix":
        return AttentionMask.prefix(CU, torch.tensor([1, 0, 4, 0], dtype=torch.int32)), False
    if kind == "rows":
        hi = torch.tensor([draw.randint(0, T) for _ in range(T)], dtype=torch.int32)
        lo = torch.tensor([draw.randint(0, int(end)) for end in hi], dtype=torch.int32)
        return AttentionMask.from_rows(lo, hi, span_q=SPANS % 2, span_k=SPANS % 3), False
    return AttentionMask.packed(CU, causal=kind == "causal", window=window if kind == "causal" else None), False


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("kind", KINDS)
def test_attention_with_any_options(kind, block, monkeypatch):
    monkeypatch.setattr(second, "_SCORES_A_BLOCK", block)
    draw = random.Random(f"{kind} {block}")
    mask, has_classes = random_mask(kind, draw)
    logits = {}
    if has_classes and draw.random() < 0.7:
        logits["pair_bias"] = leaf(H, 2, 2)
    if draw.random() < 0.5:
        logits["sink"] = leaf(H)
    if kind not in ("cross_only", "rows") and draw.random() < 0.5:
        logits["alibi_slopes"] = leaf(H, seed=5)
    dropout_p, softcap = draw.choice([0.0, 0.0, 0.3]), draw.choice([None, 1.5])

    def function(q, k, v, *of_logits):
        torch.manual_seed(3)
        given = dict(zip(logits, of_logits, strict=True))
        out, lse = attention(q, k, v, mask, return_lse=True, dropout_p=dropout_p, softcap=softcap, **given)
        return out, lse[lse > -torch.inf]

    assert_differentiable_twice(function, leaf(T, H, D), leaf(T, 2, D, seed=1), leaf(T, 2, 2), *logits.values())


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("kind", ["causal", "multimodal"])
def test_softcap_and_distances(kind, block, monkeypatch):
    monkeypatch.setattr(second, "_SCORES_A_BLOCK", block)
    mask, _ = random_mask(kind, random.Random(0))

    def function(q, k, v, sink, slopes):
        return attention(q, k, v, mask, return_lse=True, softcap=0.7, sink=sink, alibi_slopes=slopes)

    learned = leaf(H), leaf(H, seed=1)
    assert_differentiable_twice(function, leaf(T, H, D), leaf(T, 2, D, seed=1), leaf(T, 2, 2), *learned)


@pytest.mark.parametrize("block", BLOCKS)
def test_additive(block, monkeypatch):
    monkeypatch.setattr(second, "_SCORES_A_BLOCK", block)
    mask = AttentionMask.multimodal(CU, MODALITIES, SPANS)

    def function(q, k, v, w, bias):
        return additive_attention(q, k, v, w, mask, bias=bias, return_lse=True)

    inputs = leaf(T, H, D), leaf(T, 2, D, seed=1), leaf(T, 2, 2), leaf(H, D), leaf(H, D, seed=1)
    assert_differentiable_twice(function, *inputs)


@pytest.mark.parametrize("gate", [(), (1,), (D,), (H, 1)], ids=str)
def test_gate(gate):
    assert_differentiable_twice(gated_residual, leaf(5, H, D), leaf(5, H, D, seed=1), leaf(*gate))


every_norm = pytest.mark.parametrize("norm", ["rms", "layer", None])


@every_norm
@pytest.mark.parametrize("interleaved", [False, True])
def test_prologue(interleaved, norm):
    weights = {"rms": ["weight"], "layer": ["weight", "bias"], None: []}[norm]

    def function(x, *given):
        named = dict(zip(weights, given, strict=True))
        return norm_rope(x, torch.arange(5), norm=norm, base=100.0, interleaved=interleaved, **named)

    inputs = leaf(5, 2, 4), *(leaf(4, seed=i) for i in range(len(weights)))
    assert_differentiable_twice(function, *inputs)


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_norm_alone(norm):
    assert_differentiable_twice(lambda x: norm_rope(x, norm=norm), leaf(5, 2, 4))


@every_norm
def test_prologue_of_q_and_k(norm):
    bare = functools.partial(qk_norm_rope, position_ids=torch.arange(5), norm=norm, base=100.0)
    assert_differentiable_twice(bare, leaf(5, 2, 4), leaf(5, 1, 4))


def test_a_table_of_angles_has_no_derivative_in_forward_mode_either():
    x, frequencies = torch.randn(4, 1, 4), torch.rand(2)

    def turned(frequencies):
        return norm_rope(x, torch.arange(4), inv_freq=frequencies, norm=None)

    with pytest.raises(NotImplementedError, match="cos_sin, inv_freq, position_ids: not differentiable"):
        torch.func.jvp(turned, (frequencies,), (frequencies,))


def penalised(run, x):
    """Gradients with respect to q, k and v of a scalar plus the squared norms of its gradients."""
    leaves = [t.detach().requires_grad_() for t in (x.q, x.k, x.v)]
    value = (run(x, *leaves) * x.grad_out).sum()
    grads = torch.autograd.grad(value, leaves, create_graph=True)
    assert all(grad.requires_grad for grad in grads)
    return torch.autograd.grad(value + sum(grad.square().sum() for grad in grads), leaves)


def written_out(x, q, k, v):
    """SDPA's fused kernels have no double backward."""
    seen = dense_mask(x)
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = capped(torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5, x.softcap)
    p = scores.masked_fill(~seen, torch.finfo(q.dtype).min).softmax(-1).masked_fill(~seen, 0.0)
    return torch.einsum("hqk,khd->qhd", p, v)


# Each mask in each dtype where it is fast; one in the interpreter.
PENALISED = [
    *itertools.product(("native", "reference"), ("packed_causal", "image_spans", "cross_only"), DTYPES),
    ("triton", "packed_causal", torch.bfloat16),
]


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(("backend", "name", "dtype"), PENALISED, ids=str)
def test_gradient_penalty(backend, name, dtype, softcap):
    """As accurate as plain PyTorch, whichever backend gave the first derivatives: second derivatives share one code."""
    backends.need("attention", backend, dtype)
    case = MASKS[name]
    sizes = dict(heads=4, kv_heads=2, dim=16, dtype=dtype, mask=case.mask(), softcap=softcap)
    draws = [make_inputs(*case.tokens, **sizes, seed=seed) for seed in range(3)]

    def ours(x, q, k, v):
        return attention(q, k, v, x.mask, softcap=softcap, backend=backend)

    wide = [x.to(torch.float64) for x in draws]
    results = (
        [penalised(run, x) for x in of] for run, of in ((ours, draws), (written_out, draws), (written_out, wide))
    )
    for what, *three in zip("qkv", *(zip(*result, strict=True) for result in results), strict=True):
        assert_as_accurate(what, *(torch.stack(values) for values in three))


@pytest.mark.parametrize("backend", ["native", "reference"])  # Triton has no float64
def test_functorch(backend):
    backends.need("attention", backend, torch.float64)
    q, k, v = (leaf(5, 2, 2, seed=seed).detach() for seed in range(3))
    mask = AttentionMask.packed(torch.tensor([0, 2, 5], dtype=torch.int32), causal=True)
    x = AttentionInputs(q, k, v, v, v[..., 0].T, mask)

    def ours(q):
        return attention(q, k, v, mask, backend=backend)

    def plain(q):
        return written_out(x, q, k, v)

    hessians = (torch.func.hessian(lambda q, f=f: f(q).square().sum())(q) for f in (ours, plain))
    torch.testing.assert_close(*hessians)
    torch.testing.assert_close(torch.func.jacfwd(ours)(q), torch.func.jacrev(plain)(q))


def test_a_nan_stays_in_its_sample():
    """Samples that share a block are hidden from each other: 0 times a NaN contributes nothing."""
    q, k, v = leaf(T, H, D), leaf(T, H, D, seed=1), leaf(T, H, D, seed=2)
    poisoned = [t.detach().clone() for t in (q, k, v)]
    for t in poisoned:
        t[:3] = torch.nan
    mask = AttentionMask.packed(CU)
    x = AttentionInputs(q, k, v, v.detach(), v[..., 0].T, mask)
    clean, dirty = (
        penalised(lambda x, *qkv: attention(*qkv, mask), replace(x, q=t[0], k=t[1], v=t[2]))
        for t in ((q, k, v), poisoned)
    )
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a[3:], b[3:])
        assert b[:3].isnan().all()


def test_no_tokens():
    q = torch.zeros(0, H, D, requires_grad=True)
    (grad,) = torch.autograd.grad(attention(q, q, q).sum(), q, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), q)[0].shape == q.shape


def test_third_derivatives_say_so():
    q = leaf(T, H, D)
    (grad,) = torch.autograd.grad(attention(q, q, q).square().sum(), q, create_graph=True)
    (second_order,) = torch.autograd.grad(grad.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention_second has no gradient: third"):
        second_order.sum().backward()
