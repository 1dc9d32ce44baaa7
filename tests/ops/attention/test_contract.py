"""Attention as torch sees it (opcheck, compile, functorch, autocast) and as a user errs with it."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels import AttentionMask, BackendError, GradCache, attention
from mmkernels.ops.attention.api import _limits
from mmkernels.ops.attention.reference import keep
from mmkernels.ops.attention.types import MaskRows, Options
from mmkernels.runtime.backends import candidates
from mmkernels.testing.attention import make_inputs, run
from mmkernels.testing.packing import cu_seqlens_of

OPS = torch.ops.mmkernels
LENGTHS = (3, 0, 6, 1)
MASK = AttentionMask.packed(cu_seqlens_of(LENGTHS), causal=True)


@pytest.fixture(params=["native", "reference"])
def backend(request) -> str:
    reason = candidates("attention", torch.device("cpu"), torch.float32)[request.param]
    if reason is not None:
        pytest.skip(reason)
    return request.param


def leaves(tokens=10, heads=4, kv_heads=2, dim=8):
    x = make_inputs(tokens, tokens, heads=heads, kv_heads=kv_heads, dim=dim)
    return [t.requires_grad_() for t in (x.q, x.k, x.v)]


SPANS = torch.tensor([0, 0, -1, 1, 1, 1, -1, -1, -1, -1], dtype=torch.int32)
MODALITIES = (SPANS >= 0).byte()
CROSS = AttentionMask.cross_only(cu_seqlens_of(LENGTHS), MODALITIES)


def arguments(dropout_p=0.25, scale=0.3):
    """Every argument of the bare op after q, k, v and before the backend, each option in use."""
    seed = torch.tensor([11])
    options = torch.randn(4, 2, 2, requires_grad=True), torch.randn(4, requires_grad=True), seed, dropout_p, scale
    return (*CROSS.rows_with_classes(10, 10, (2, 2)), *options)


def test_opcheck(backend):
    plain_rows, none = MASK.rows(10, 10), (None, None, None, 0.0, 0.3)
    for extra in ((*plain_rows, *none), arguments()):
        torch.library.opcheck(OPS.attention_fwd.default, (*leaves(), *extra, backend))
        q, k, v = (x.detach() for x in leaves())
        extra = [x.detach() if isinstance(x, Tensor) else x for x in extra]
        out, lse = OPS.attention_fwd(q, k, v, *extra, backend)
        grads = torch.randn_like(out), torch.randn_like(lse)
        torch.library.opcheck(OPS.attention_bwd.default, (*grads, q, k, v, out, lse, *extra, backend))
        torch.library.opcheck(OPS.attention_bwd.default, (grads[0], None, q, k, v, out, lse, *extra, backend))


@pytest.mark.parametrize("mask_in_graph", [False, True])
def test_fullgraph_compile(backend, mask_in_graph):
    boundaries = cu_seqlens_of(LENGTHS)

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


BUILDERS = {
    "multimodal": lambda cu: AttentionMask.multimodal(cu, MODALITIES, SPANS, window=4),
    "prefix": lambda cu: AttentionMask.prefix(cu, torch.tensor([2, 0, 3, 1], dtype=torch.int32)),
    "media": lambda cu: AttentionMask.media(cu, cu, SPANS, SPANS.clamp(min=1)),
    "media_own": lambda cu: AttentionMask.media(cu, cu, SPANS, SPANS, mode="own"),
    "cross_only": lambda cu: AttentionMask.cross_only(cu, MODALITIES),
}


@pytest.mark.parametrize("build", BUILDERS)
def test_builders_compile(build):
    boundaries = cu_seqlens_of(LENGTHS)

    def loss(q, k, v):
        return attention(q, k, v, BUILDERS[build](boundaries)).square().sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = leaves()
    expected, got = (torch.autograd.grad(f(*inputs), inputs) for f in (loss, compiled))
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_options_compile(backend):
    def loss(q, k, v, bias, sink):
        out = attention(q, k, v, CROSS, pair_bias=bias, sink=sink, dropout_p=0.25, backend=backend)
        return out.square().sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = [*leaves(), torch.randn(4, 2, 2, requires_grad=True), torch.randn(4, requires_grad=True)]
    results = []
    for f in (loss, compiled):
        torch.manual_seed(5)
        results.append(torch.autograd.grad(f(*inputs), inputs))
    for ours, theirs in zip(*results, strict=True):
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
    bare = OPS.attention_fwd(q, k, v, *MASK.rows(10, 10), None, None, None, 0.0, 8**-0.5, backend)[0]
    assert torch.equal(torch.autograd.grad(bare.sum(), q)[0], expected)
    again = torch.utils.checkpoint.checkpoint(attention, q, k, v, MASK, backend=backend, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again.sum(), q)[0], expected)


def test_dropout_is_replayed(backend):
    """Checkpointing and whoever restores torch's generator get the same mask; another state gives another."""
    q, k, v = leaves()

    def layer(q):
        return attention(q, k, v, MASK, dropout_p=0.5, backend=backend)

    torch.manual_seed(3)
    plain = layer(q)
    torch.manual_seed(3)
    again = torch.utils.checkpoint.checkpoint(layer, q, use_reentrant=False)
    assert torch.equal(plain, again)
    grads = [torch.autograd.grad(out.square().sum(), q)[0] for out in (plain, again)]
    assert torch.equal(*grads)
    assert not torch.equal(layer(q), plain)


def test_dropout_is_replayed_by_grad_cache(backend):
    x = torch.randn(6, 5, 2, 8)
    weight = torch.randn(8, 8, requires_grad=True)

    def encoder(chunk):
        h = chunk @ weight
        return attention(h, h, h, dropout_p=0.5, backend=backend).flatten(1)

    gradients = []
    for chunk_size in (2, 3):  # draws differ between chunkings, the two passes of one must not
        torch.manual_seed(1)
        weight.grad = None
        GradCache([encoder], lambda e: e.square().sum(), chunk_size=chunk_size)(x)
        gradients.append(weight.grad.clone())
        torch.manual_seed(1)
        direct = sum(encoder(chunk).square().sum() for chunk in x.split(chunk_size))
        torch.testing.assert_close(gradients[-1], torch.autograd.grad(direct, weight)[0])
    assert not torch.equal(*gradients)


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
    """The published test vectors of Philox 4x32-10 (Random123) whose counter is one of ours: all zeros."""
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    for i, word in enumerate(words):
        share = (word >> 1) / 2**31
        for p, expected in ((1 - share - 1e-9, True), (1 - share + 1e-9, False)):
            assert keep(torch.tensor([0]), p, 1, 4, 1)[0, i, 0].item() is expected


def test_a_sink_is_a_key_without_a_value(backend):
    q, k, v = (x.detach() for x in leaves(kv_heads=4))
    sink = torch.randn(4)
    out, lse = attention(q, k, v, MASK, sink=sink, return_lse=True, backend=backend)
    bare, bare_lse = attention(q, k, v, MASK, return_lse=True, backend=backend)
    torch.testing.assert_close(lse, torch.logaddexp(bare_lse, sink[:, None]))
    torch.testing.assert_close(out, bare * (bare_lse - lse).exp().T[..., None])
    for height in (-1e4, 1e4):  # one that is not there, one that takes all
        out = attention(q, k, v, MASK, sink=torch.full((4,), height), backend=backend)
        torch.testing.assert_close(out, bare if height < 0 else torch.zeros_like(bare))


def test_a_query_that_sees_nothing_has_no_sink(backend):
    mask = AttentionMask.cross_only(cu_seqlens_of((3, 2)), torch.tensor([0, 1, 1, 0, 0], dtype=torch.uint8))
    q, k, v = (x.detach().requires_grad_() for x in leaves(5))
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
    # The bias of a query's own class is never used.
    assert not grads[4].diagonal(dim1=1, dim2=2).any()


def test_the_same_bits_every_time(backend):
    x = make_inputs(300, 300, heads=4, kv_heads=2, dim=40, dtype=torch.bfloat16)
    mask = AttentionMask.cross_only(cu_seqlens_of([100, 200]), (torch.arange(300) % 7 < 3).byte())
    options = {"mask": mask, "pair_bias": torch.randn(4, 2, 2), "sink": torch.randn(4), "dropout_p": 0.2}
    x = replace(x, **options)
    first, second = run(x, backend), run(x, backend)
    for (name, a), (_, b) in zip(first.items(), second.items(), strict=True):
        assert torch.equal(a, b), name


def test_batched_with_options_equals_packed(backend):
    q, k, v = (torch.randn(2, 5, heads, 8) for heads in (4, 2, 2))
    mask = AttentionMask.cross_only(cu_seqlens_of((5, 5)), MODALITIES)
    options = {"pair_bias": torch.randn(4, 2, 2), "sink": torch.randn(4), "dropout_p": 0.25, "backend": backend}
    torch.manual_seed(0)
    batched = attention(q, k, v, mask, **options)
    torch.manual_seed(0)
    packed = attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), mask, **options)
    assert torch.equal(batched.flatten(0, 1), packed)


def test_a_class_beyond_the_table_shows_where_values_are_not_looked_at(monkeypatch):
    """On a GPU nothing checks classes; the kernels give NaN for them and read no foreign memory."""
    q, k, v = (x.detach() for x in leaves())
    mask = MASK.with_classes(torch.tensor([0, 1, 0, 0, 0, 0, 0, 0, 0, 0], dtype=torch.int32))
    monkeypatch.setattr(AttentionMask, "_values_are_readable", lambda self: False)
    if candidates("attention", torch.device("cpu"), torch.float32)["native"] is not None:
        pytest.skip("no native core")
    out = attention(q, k, v, mask, pair_bias=torch.zeros(4, 1, 1), backend="native")
    assert out[1:3].isnan().any()
    assert torch.isfinite(out[3:]).all()


def test_cuda_kernels_say_what_they_do_not_take():
    """On any tensor that is not the CPU's: the limits follow from the call alone."""
    q = torch.empty(10, 4, 8, device="meta")
    given = MaskRows(*CROSS.rows(10, 10)), Options(torch.zeros(4, 2, 2), torch.zeros(4), torch.tensor([1]), 0.1, 1.0)
    bare = MaskRows(*MASK.rows(10, 10)), Options(None, None, None, 0.0, 1.0)
    reason = _limits(q, q, *given)["native"]
    for what in ("spans and classes in a mask", "pair_bias", "sink", "dropout_p"):
        assert what in reason
    assert "sink" in _limits(q, q, bare[0], bare[1]._replace(sink=torch.zeros(4)))["native"]
    assert _limits(q, q, *bare) is None
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


@pytest.mark.gpu
@pytest.mark.parametrize("build", BUILDERS)
def test_no_host_sync_and_cuda_graphs(build):
    """Building, laying out, forward and backward never wait for the device, so they can be captured."""
    cu = cu_seqlens_of(LENGTHS, "cuda")
    metadata = {name: x.cuda() for name, x in (("SPANS", SPANS), ("MODALITIES", MODALITIES))}
    q, k, v = (x.detach().cuda().to(torch.bfloat16).requires_grad_() for x in leaves(dim=64))
    builders = {
        "multimodal": lambda: AttentionMask.multimodal(cu, metadata["MODALITIES"], metadata["SPANS"], window=4),
        "prefix": lambda: AttentionMask.prefix(cu, cu[1:] - cu[:-1]),
        "media": lambda: AttentionMask.media(cu, cu, metadata["SPANS"], metadata["SPANS"].clamp(min=1)),
        "media_own": lambda: AttentionMask.media(cu, cu, metadata["SPANS"], metadata["SPANS"], mode="own"),
        "cross_only": lambda: AttentionMask.cross_only(cu, metadata["MODALITIES"]),
    }

    def step():
        out = attention(q, k, v, builders[build](), sink=sink, dropout_p=0.25)
        return out, *torch.autograd.grad(out.square().sum(), (q, k, v))

    sink = torch.randn(4, device="cuda")
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    step()
    torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    first = [x.clone() for x in captured]
    graph.replay()
    assert not torch.equal(first[0], captured[0])  # the generator moves on between replays
    assert all(torch.isfinite(x).all() for x in captured)


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
    mask = AttentionMask.packed(cu_seqlens_of((2, 3)), cu_seqlens_of((0, 4)))
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
    mask = AttentionMask.packed(cu_seqlens_of(LENGTHS))
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
SMALL = AttentionMask.packed(cu_seqlens_of([5]))
CLASSED = SMALL.with_classes(torch.tensor([0, 0, 1, 0, 0], dtype=torch.uint8))
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
    (dict(pair_bias=torch.zeros(4, 1, 1)), ValueError, "mask: expected a mask with classes for pair_bias, got None"),
    (dict(pair_bias=torch.zeros(3, 1, 1)), ValueError, r"pair_bias: expected \[4, Cq, Ck\] with 1 to 32 classes"),
    (dict(pair_bias=torch.zeros(4, 33, 1)), ValueError, r"pair_bias: expected \[4, Cq, Ck\] with 1 to 32 classes"),
    (dict(pair_bias=torch.zeros(4, 2)), ValueError, r"pair_bias: expected \[H, Cq, Ck\] floating point"),
    (dict(pair_bias=torch.zeros(4, 1, 1), mask=SMALL), ValueError, "mask: expected classes for a pair_bias"),
    (dict(pair_bias=torch.zeros(4, 1, 2), mask=CLASSED), ValueError, r"class_q: expected classes in \[0, 1\).*got 1"),
    (dict(pair_bias=torch.zeros(4, 2, 1), mask=CLASSED), ValueError, r"class_k: expected classes in \[0, 1\).*got 1"),
    (dict(sink=torch.zeros(3)), ValueError, r"sink: expected \[4\], one per head"),
    (dict(sink=0.5), TypeError, r"sink: expected \[H\] floating point, got 0.5"),
    (dict(sink=torch.zeros(4, dtype=torch.int32)), TypeError, r"sink: expected \[H\] floating point"),
    (dict(dropout_p=1.0), ValueError, r"dropout_p: expected a probability in \[0, 1\), got 1.0"),
    (dict(dropout_p=-0.1), ValueError, r"dropout_p: expected a probability in \[0, 1\)"),
    (dict(dropout_p=float("nan")), ValueError, r"dropout_p: expected a probability in \[0, 1\)"),
    (dict(dropout_p=True), TypeError, "dropout_p: expected a float"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), BAD)
def test_a_mistake_is_named(wrong, error, message):
    with pytest.raises(error, match=message):
        attention(**(dict(q=Q, k=K, v=V) | wrong))


def test_a_backend_that_cannot_serve_says_why():
    x = torch.randn(3, 1, 300)
    with pytest.raises(BackendError, match=r"(?s)backend='triton' cannot serve.*reference: can serve"):
        attention(x.double(), x.double(), x.double(), backend="triton")
