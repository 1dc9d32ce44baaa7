"""Attention's promises about sinks, dropout, batches, empty inputs and layouts, and its error messages."""

import itertools
from dataclasses import replace

import backends
import named
import pytest
import torch

from mmkernels import AttentionMask, BackendError, attention
from mmkernels.ops.attention.api import _limits
from mmkernels.ops.attention.native import _expect_cuda_takes
from mmkernels.ops.attention.reference import keep
from mmkernels.ops.attention.types import MaskRows, Options
from mmkernels.testing.attention import make_inputs, run
from mmkernels.testing.packing import cu_seqlens_of

LENGTHS = (3, 0, 6, 1)
MASK = AttentionMask.packed(cu_seqlens_of(LENGTHS), causal=True)
MODALITIES = torch.tensor([1, 1, 0, 1, 1, 1, 0, 0, 0, 0], dtype=torch.uint8)
CROSS = AttentionMask.cross_only(cu_seqlens_of(LENGTHS), MODALITIES)

backend = backends.fixture("attention")


def qkv(tokens=10, heads=4, kv_heads=2, dim=8):
    x = make_inputs(tokens, tokens, heads=heads, kv_heads=kv_heads, dim=dim)
    return x.q, x.k, x.v


def test_dropout_keeps_its_share_and_its_mean():
    heads, tokens, p = 4, 256, 0.3
    kept = keep(torch.tensor([123456789]), p, heads, tokens, tokens)
    # Binomial: the share of n = 2^18 draws has a standard deviation of 9e-4; no axis may show a pattern.
    n = kept.numel()
    assert abs(kept.double().mean().item() - (1 - p)) < 4 * (p * (1 - p) / n) ** 0.5
    for axis in (0, 1, 2):
        others = n // kept.shape[axis]
        shares = kept.double().movedim(axis, 0).flatten(1).mean(1)
        assert (shares - (1 - p)).abs().max() < 5 * (p * (1 - p) / others) ** 0.5
    assert not torch.equal(kept, keep(torch.tensor([123456790]), p, heads, tokens, tokens))
    q = torch.zeros(tokens, heads, 8)
    out = torch.stack([attention(q, q, torch.ones_like(q), dropout_p=p) for _ in range(8)])
    assert abs(out.mean().item() - 1) < 5 * (p / (1 - p) / (8 * n)) ** 0.5


def test_philox_is_philox():
    """The published Philox 4x32-10 test vectors (Random123) with a counter that we use: all zeros."""
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    for i, word in enumerate(words):
        share = (word >> 1) / 2**31
        for p, expected in ((1 - share - 1e-9, True), (1 - share + 1e-9, False)):
            assert keep(torch.tensor([0]), p, 1, 4, 1)[0, i, 0].item() is expected


def test_a_sink_is_a_key_without_a_value(backend):
    q, k, v = qkv(kv_heads=4)
    sink = torch.randn(4)
    out, lse = attention(q, k, v, MASK, sink=sink, return_lse=True, backend=backend)
    bare, bare_lse = attention(q, k, v, MASK, return_lse=True, backend=backend)
    torch.testing.assert_close(lse, torch.logaddexp(bare_lse, sink[:, None]))
    torch.testing.assert_close(out, bare * (bare_lse - lse).exp().T[..., None])
    for height in (-1e4, 1e4):  # a negligible sink, and one that takes all the weight
        out = attention(q, k, v, MASK, sink=torch.full((4,), height), backend=backend)
        torch.testing.assert_close(out, bare if height < 0 else torch.zeros_like(bare))


def test_distances_change_only_the_logits(backend):
    """Against a written-out softmax, for samples whose queries and keys differ in number, and without a mask."""
    cu_q, cu_k = cu_seqlens_of((3, 0, 5)), cu_seqlens_of((5, 2, 3))
    q, k, v = (torch.randn(tokens, 4, 8) for tokens in (8, 10, 10))
    slopes = torch.tensor([0.5, 0.25, 0.125, -0.25])
    mask = AttentionMask.packed(cu_q, cu_k)
    out = attention(q, k, v, mask, alibi_slopes=slopes, backend=backend)
    for i, j in ((slice(0, 3), slice(0, 5)), (slice(3, 8), slice(7, 10))):
        at = torch.arange(q[i].shape[0]) + k[j].shape[0] - q[i].shape[0]
        distance = (at[:, None] - torch.arange(k[j].shape[0])).abs()
        scores = torch.einsum("qhd,khd->hqk", q[i], k[j]) / 8**0.5 - slopes[:, None, None] * distance
        expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[j])
        torch.testing.assert_close(out[i], expected)
        torch.testing.assert_close(attention(q[i], k[j], v[j], alibi_slopes=slopes, backend=backend), expected)
    batch = [torch.randn(2, tokens, 4, 8) for tokens in (3, 5, 5)]
    both = attention(*batch, alibi_slopes=slopes, backend=backend)
    for b, one in enumerate(zip(*batch, strict=True)):
        torch.testing.assert_close(both[b], attention(*one, alibi_slopes=slopes, backend=backend))


def test_a_soft_cap_bounds_the_scores(backend):
    q, k, v = qkv(kv_heads=4)
    bare = attention(q, k, v, MASK, backend=backend)
    torch.testing.assert_close(attention(q, k, v, MASK, softcap=1e4, backend=backend), bare)
    mean = attention(torch.zeros_like(q), k, v, MASK, backend=backend)
    torch.testing.assert_close(attention(q, k, v, MASK, softcap=1e-30, backend=backend), mean)
    large = attention(q * 1e15, k * 1e15, v, MASK, softcap=0.5, return_lse=True, backend=backend)
    signs = torch.einsum("qhd,khd->hqk", q, k).sign()
    expected = torch.logsumexp((0.5 * signs).masked_fill(~MASK.to_dense(), -torch.inf), -1)
    torch.testing.assert_close(large[1], expected)


def test_a_query_that_sees_nothing_has_no_sink(backend):
    mask = AttentionMask.cross_only(cu_seqlens_of((3, 2)), torch.tensor([0, 1, 1, 0, 0], dtype=torch.uint8))
    q, k, v = (x.requires_grad_() for x in qkv(5))
    sink = torch.randn(4, requires_grad=True)
    bias = torch.randn(4, 2, 2, requires_grad=True)
    out, lse = attention(q, k, v, mask, sink=sink, pair_bias=bias, return_lse=True, backend=backend)
    assert not out[3:].any()
    assert (lse[:, 3:] == -torch.inf).all()
    assert torch.isfinite(lse[:, :3]).all()
    grads = torch.autograd.grad(out.sum() + lse[:, :3].sum(), (q, k, v, sink, bias))
    assert all(torch.isfinite(grad).all() for grad in grads)
    for grad in grads[:3]:
        assert not grad[3:].any()
        assert grad[:3].any()
    # The bias of a query's own class is unused.
    assert not grads[4].diagonal(dim1=1, dim2=2).any()


def test_a_query_that_sees_nothing(backend):
    mask = AttentionMask.packed(cu_seqlens_of((2, 3)), cu_seqlens_of((0, 4)))
    q, k, v = (torch.randn(tokens, 2, 8, requires_grad=True) for tokens in (5, 4, 4))
    out, lse = attention(q, k, v, mask, return_lse=True, backend=backend)
    assert not out[:2].any()
    assert (lse[:, :2] == -torch.inf).all()
    dq, dk, dv = torch.autograd.grad(out.sum() + lse[:, 2:].sum(), (q, k, v))
    assert not dq[:2].any()
    assert torch.isfinite(dk).all()
    assert torch.isfinite(dv).all()


def test_empty(backend):
    for tokens_q, tokens_k in ((0, 0), (0, 3), (3, 0)):
        q, k, v = (torch.randn(t, 2, 8, requires_grad=True) for t in (tokens_q, tokens_k, tokens_k))
        out = attention(q, k, v, backend=backend)
        assert out.shape == (tokens_q, 2, 8)
        assert not out.any()
        for grad, x in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v), strict=True):
            assert grad.shape == x.shape
            assert not grad.any()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_the_same_bits_every_time(backend):
    """Not in Triton: its interpreter runs programs one after another."""
    backends.need("attention", backend, torch.bfloat16)
    x = make_inputs(300, 300, heads=4, kv_heads=2, dim=40, dtype=torch.bfloat16)
    mask = AttentionMask.cross_only(cu_seqlens_of([100, 200]), (torch.arange(300) % 7 < 3).byte())
    options = {"mask": mask, "pair_bias": torch.randn(4, 2, 2), "sink": torch.randn(4), "dropout_p": 0.2}
    x = replace(x, **options)
    first, second = run(x, backend), run(x, backend)
    for (name, a), (_, b) in zip(first.items(), second.items(), strict=True):
        assert torch.equal(a, b), name


def test_batched_equals_sample_by_sample(backend):
    q, k, v = (torch.randn(3, tokens, heads, 8) for tokens, heads in ((5, 4), (7, 2), (7, 2)))
    out, lse = attention(q, k, v, return_lse=True, backend=backend)
    assert out.shape == (3, 5, 4, 8)
    assert lse.shape == (3, 4, 5)
    for b in range(3):
        one, one_lse = attention(q[b], k[b], v[b], return_lse=True, backend=backend)
        torch.testing.assert_close(out[b], one)
        torch.testing.assert_close(lse[b], one_lse)


def test_batched_with_options_equals_packed(backend):
    q, k, v = (torch.randn(2, 5, heads, 8) for heads in (4, 2, 2))
    mask = AttentionMask.cross_only(cu_seqlens_of((5, 5)), MODALITIES)
    options = {"pair_bias": torch.randn(4, 2, 2), "sink": torch.randn(4), "dropout_p": 0.25, "backend": backend}
    torch.manual_seed(0)
    batched = attention(q, k, v, mask, **options)
    torch.manual_seed(0)
    packed = attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), mask, **options)
    assert torch.equal(batched.flatten(0, 1), packed)


@pytest.mark.parametrize("heads", [(1, 4), (4, 2), (2, 1)])
def test_keys_and_values_of_different_head_counts(backend, heads):
    """As if each had a head for every query head, with exact gradients."""
    q, k, v = (torch.randn(5, count, 8, requires_grad=True) for count in (4, *heads))
    wide = (x.repeat_interleave(4 // count, 1) for x, count in zip((k, v), heads, strict=True))
    results = [attention(q, k, v, SMALL, backend=backend), attention(q, *wide, SMALL, backend=backend)]
    torch.testing.assert_close(*results)
    grads = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in results]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)
    batch = [x.detach()[None] for x in (q, k, v)]
    torch.testing.assert_close(attention(*batch, backend=backend)[0], attention(q, k, v, backend=backend))


def test_non_contiguous(backend):
    wide = torch.randn(10, 3, 4, 16)
    q, _, v = wide[..., :8].unbind(1)  # the usual fused projection
    columns = torch.randn(10, 4, 16)[..., ::2]
    torch.testing.assert_close(
        attention(q, columns, v, MASK, backend=backend),
        attention(q.contiguous(), columns.contiguous(), v.contiguous(), MASK, backend=backend),
    )


def test_samples_do_not_see_each_other(backend):
    q, k, v = qkv()
    mask = AttentionMask.packed(cu_seqlens_of(LENGTHS))
    before = attention(q, k, v, mask, backend=backend)
    k[3:9], v[3:9], q[3:9] = 1e4, 1e30, 7
    after = attention(q, k, v, mask, backend=backend)
    assert torch.equal(before[:3], after[:3])
    assert torch.equal(before[9:], after[9:])
    assert not torch.equal(before[3:9], after[3:9])


def test_a_class_beyond_the_table_shows_where_values_are_not_looked_at(monkeypatch):
    """On a GPU nothing checks classes; the kernels return NaN for them and read no foreign memory."""
    q, k, v = qkv()
    mask = MASK.with_classes(torch.tensor([0, 1, 0, 0, 0, 0, 0, 0, 0, 0], dtype=torch.int32))
    monkeypatch.setattr(AttentionMask, "_values_are_readable", lambda self: False)
    backends.need("attention", "native")
    out = attention(q, k, v, mask, pair_bias=torch.zeros(4, 1, 1), backend="native")
    assert out[1:3].isnan().any()
    assert torch.isfinite(out[3:]).all()


def test_cuda_kernels_say_what_they_do_not_take():
    """On any non-CPU tensor: the limits follow from the call alone."""
    q = torch.empty(10, 4, 8, device="meta")
    given = MaskRows(*CROSS.rows(10, 10)), Options(torch.zeros(4, 2, 2), torch.zeros(4), torch.tensor([1]), 0.1, 1.0)
    bare = MaskRows(*MASK.rows(10, 10)), Options(None, None, None, 0.0, 1.0)
    reason = _limits(q, q, *given)["native"]
    for what in ("spans and classes in a mask", "pair_bias", "sink", "dropout_p"):
        assert what in reason
    assert "sink" in _limits(q, q, bare[0], bare[1]._replace(sink=torch.zeros(4)))["native"]
    assert "alibi_slopes" in _limits(q, q, bare[0], bare[1]._replace(slopes=torch.zeros(4)))["native"]
    assert "return_max_logit" in _limits(q, q, bare[0], bare[1]._replace(with_max=True))["native"]
    assert _limits(q, q, *bare) is _limits(q, q, bare[0], bare[1]._replace(softcap=30.0)) is None
    assert _limits(torch.empty(10, 4, 8), q, *given) is None


def test_kernel_tiles_lie_inside_those_of_the_map():
    pytest.importorskip("triton")
    from mmkernels.ops.attention import tiles, triton_bwd, triton_fwd

    assert (triton_fwd.TILE_Q.value, triton_fwd.TILE_K.value) == (tiles.TILE_Q, tiles.TILE_K)
    assert (triton_fwd.SKIP.value, triton_fwd.FULL.value) == (tiles.SKIP, tiles.FULL)
    for choose in (triton_fwd.fwd_config, triton_bwd.dq_config, triton_bwd.dkdv_config):
        for single, head_dim, major in itertools.product((True, False), (64, 128, 256), (8, 9, 10)):
            config = choose(True, single, head_dim, major)
            assert tiles.TILE_Q % config["BLOCK_M"] == 0
            assert tiles.TILE_K % config["BLOCK_N"] == 0


Q, K, V = (torch.randn(5, heads, 8) for heads in (4, 2, 2))
SMALL = AttentionMask.packed(cu_seqlens_of([5]))
CLASSED = SMALL.with_classes(torch.tensor([0, 0, 1, 0, 0], dtype=torch.uint8))
BAD = {
    "q": [
        (dict(q=None), TypeError, r"q: expected \[Tq, H, D\] or \[B, Tq, H, D\] floating point, got None"),
        (dict(q=torch.zeros(5, 8)), ValueError, r"q: expected .*got \[5, 8\] float32"),
        (dict(q=torch.zeros(5, 4, 8, dtype=torch.int32)), TypeError, "q: expected .* floating point, got .*int32"),
    ],
    "k": [
        (dict(k=K.double()), TypeError, r"k: expected \[Tk, Hkv, D\] float32, got .*float64"),
        (dict(k=K[..., :7]), ValueError, "k: expected head dim D=8 like q"),
        (dict(k=torch.randn(5, 3, 8)), ValueError, "k: expected a number of heads Hkv that divides q's 4"),
    ],
    "v": [
        (dict(v=V[:4]), ValueError, r"v: expected \[5, 2, 'Dv'\] like k"),
        (
            dict(v=torch.randn(5, 3, 8)),
            ValueError,
            "v: expected a number of heads that divides q's 4, and divides k's 2 or is a multiple of it",
        ),
        (
            dict(q=torch.randn(5, 6, 8), v=torch.randn(5, 3, 8)),
            ValueError,
            "v: expected a number of heads that divides q's 6, and divides k's 2 or is a multiple of it",
        ),
    ],
    "mask": [
        (dict(mask=torch.ones(5, 5)), TypeError, "mask: expected an AttentionMask or None"),
        (
            dict(pair_bias=torch.zeros(4, 1, 1)),
            ValueError,
            "mask: expected a mask with classes for pair_bias, got None",
        ),
        (dict(pair_bias=torch.zeros(4, 1, 1), mask=SMALL), ValueError, "mask: expected classes for a pair_bias"),
    ],
    "mask of another size": [
        (dict(mask=MASK), ValueError, "cu_seqlens_q: expected at most 5 tokens|mask: expected q and k of"),
    ],
    "scale": [
        (dict(scale="1"), TypeError, "scale: expected a float or None, got '1'"),
        (dict(scale=float("nan")), ValueError, "scale: expected a finite number"),
    ],
    "return_lse": [
        (dict(return_lse=1), TypeError, "return_lse: expected a bool"),
    ],
    "return_max_logit": [
        (dict(return_max_logit=1), TypeError, "return_max_logit: expected a bool"),
    ],
    "deterministic": [
        (dict(deterministic="yes"), TypeError, "deterministic: expected None, True or False"),
    ],
    "backend": [
        (dict(backend="cudnn"), ValueError, "backend: expected None or one of native, triton, reference"),
    ],
    "pair_bias": [
        (dict(pair_bias=torch.zeros(3, 1, 1)), ValueError, r"pair_bias: expected \[4, Cq, Ck\] with 1 to 32 classes"),
        (dict(pair_bias=torch.zeros(4, 33, 1)), ValueError, r"pair_bias: expected \[4, Cq, Ck\] with 1 to 32 classes"),
        (dict(pair_bias=torch.zeros(4, 2)), ValueError, r"pair_bias: expected \[H, Cq, Ck\] floating point"),
    ],
    "class_q": [
        (
            dict(pair_bias=torch.zeros(4, 1, 2), mask=CLASSED),
            ValueError,
            r"class_q: expected classes in \[0, 1\).*got 1",
        ),
    ],
    "class_k": [
        (
            dict(pair_bias=torch.zeros(4, 2, 1), mask=CLASSED),
            ValueError,
            r"class_k: expected classes in \[0, 1\).*got 1",
        ),
    ],
    "sink": [
        (dict(sink=torch.zeros(3)), ValueError, r"sink: expected \[4\], one per head"),
        (dict(sink=0.5), TypeError, r"sink: expected \[H\] floating point, got 0.5"),
        (dict(sink=torch.zeros(4, dtype=torch.int32)), TypeError, r"sink: expected \[H\] floating point"),
    ],
    "softcap": [
        (dict(softcap=0.0), ValueError, r"softcap: expected a number from 1e-30 to 1e\+30, got 0.0"),
        (dict(softcap=-1.0), ValueError, "softcap: expected a number from 1e-30"),
        (dict(softcap=float("inf")), ValueError, "softcap: expected a number from 1e-30"),
        (dict(softcap=float("nan")), ValueError, "softcap: expected a number from 1e-30"),
        (dict(softcap=True), TypeError, "softcap: expected a float or None"),
        (
            dict(softcap=1e-30, scale=-1e10),
            ValueError,
            r"softcap: expected at least 1e-28 with scale -1e\+10, got 1e-30",
        ),
    ],
    "alibi_slopes": [
        (dict(alibi_slopes=torch.zeros(3)), ValueError, r"alibi_slopes: expected \[4\], one per head"),
        (dict(alibi_slopes=0.5), TypeError, r"alibi_slopes: expected \[H\] floating point, got 0.5"),
        (
            dict(alibi_slopes=torch.zeros(4), mask=AttentionMask.cross_only(cu_seqlens_of([5]), torch.zeros(5).byte())),
            ValueError,
            r"mask: expected positions for alibi_slopes \(packed, .*, or with_positions\), got CrossOnly",
        ),
        (
            dict(alibi_slopes=torch.zeros(4), mask=SMALL.with_positions(torch.arange(4))),
            ValueError,
            r"mask: at_q: expected \[5\], one per query",
        ),
    ],
    "dropout_p": [
        (dict(dropout_p=1.0), ValueError, r"dropout_p: expected a probability in \[0, 1\), got 1.0"),
        (dict(dropout_p=-0.1), ValueError, r"dropout_p: expected a probability in \[0, 1\)"),
        (dict(dropout_p=float("nan")), ValueError, r"dropout_p: expected a probability in \[0, 1\)"),
        (dict(dropout_p=True), TypeError, "dropout_p: expected a float"),
    ],
}


@pytest.mark.parametrize("argument", BAD)
def test_a_mistake_is_named(argument):
    given = dict(q=Q, k=K, v=V)
    named.mistakes(
        *((lambda wrong=wrong: attention(**(given | wrong)), *expected) for wrong, *expected in BAD[argument])
    )


def test_a_backend_that_cannot_serve_says_why():
    x = torch.randn(3, 1, 300)
    with pytest.raises(BackendError, match=r"(?s)backend='triton' does not support.*reference: supported"):
        attention(x.double(), x.double(), x.double(), backend="triton")


def test_cuda_kernels_name_what_they_do_not_take():
    """The op itself is called past `attention`, which picks another backend; it must not leave options out."""
    plain = Options(None, None, None, 0.0, 1.0, softcap=5.0)
    _expect_cuda_takes(plain)
    some = torch.ones(1)
    options = {"pair_bias": some, "sink": some, "seed": some, "slopes": some, "with_max": True}
    given = {"seed": "dropout_p", "slopes": "alibi_slopes", "with_max": "return_max_logit"}
    for name, value in options.items():
        with named.case(name), pytest.raises(ValueError, match=f"do not support {given.get(name, name)}$"):
            _expect_cuda_takes(plain._replace(**{name: value}))
    with pytest.raises(ValueError, match="do not support alibi_slopes, pair_bias, sink, dropout_p, return_max_logit"):
        _expect_cuda_takes(plain._replace(**options))
