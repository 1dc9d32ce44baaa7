"""Attention as torch sees it: opcheck, compile, functorch, autocast, checkpointing, CUDA graphs."""

import backends
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels import AttentionMask, GradCache, attention
from mmkernels.ops.attention.types import Options
from mmkernels.testing.attention import make_inputs
from mmkernels.testing.packing import cu_seqlens_of

OPS = torch.ops.mmkernels
LENGTHS = (3, 0, 6, 1)
MASK = AttentionMask.packed(cu_seqlens_of(LENGTHS), causal=True)
SPANS = torch.tensor([0, 0, -1, 1, 1, 1, -1, -1, -1, -1], dtype=torch.int32)
MODALITIES = (SPANS >= 0).byte()
CROSS = AttentionMask.cross_only(cu_seqlens_of(LENGTHS), MODALITIES)

backend = backends.fixture("attention")


def leaves(tokens=10, heads=4, kv_heads=2, dim=8):
    x = make_inputs(tokens, tokens, heads=heads, kv_heads=kv_heads, dim=dim)
    return [t.requires_grad_() for t in (x.q, x.k, x.v)]


def arguments(dropout_p=0.25, scale=0.3):
    """Every argument of the bare op after q, k, v and before the backend, each option in use."""
    seed = torch.tensor([11])
    learned = torch.randn(4, 2, 2, requires_grad=True), torch.randn(4, requires_grad=True)
    rows = CROSS.rows_with_classes(10, 10, (2, 2)).changed(at_q=MASK.positions(10, 10))
    return (*rows, *Options(*learned, seed, dropout_p, scale, 2.0, torch.rand(4, requires_grad=True), True))


NONE = Options(None, None, None, 0.0, 8**-0.5)


def test_opcheck(backend):
    for extra in ((*MASK.rows(10, 10), *NONE), arguments()):
        torch.library.opcheck(OPS.attention_fwd.default, (*leaves(), *extra, backend))
        q, k, v = (x.detach() for x in leaves())
        extra = [x.detach() if isinstance(x, Tensor) else x for x in extra]
        out, lse, _ = OPS.attention_fwd(q, k, v, *extra, backend)
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
    "padding": lambda cu, modalities, spans: AttentionMask.from_padding((spans >= 0).view(2, 5), causal=True),
    "promised": lambda cu, modalities, spans: AttentionMask.from_padding(cu.new_ones(2, 5), contiguous=True),
    "window": lambda cu, modalities, spans: AttentionMask.packed(cu, window=(2, 1)),
    "batched": lambda cu, modalities, spans: AttentionMask.batched(2, 5, window=(None, 1), device=cu.device),
    "multimodal": lambda cu, modalities, spans: AttentionMask.multimodal(cu, modalities, spans, window=4),
    "prefix": lambda cu, modalities, spans: AttentionMask.prefix(cu, (cu[1:] - cu[:-1] + 1) // 2),
    "media": lambda cu, modalities, spans: AttentionMask.media(cu, cu, spans, spans.clamp(min=1)),
    "media_own": lambda cu, modalities, spans: AttentionMask.media(cu, cu, spans, spans, mode="own"),
    "cross_only": lambda cu, modalities, spans: AttentionMask.cross_only(cu, modalities),
}


@pytest.mark.parametrize("build", BUILDERS)
def test_builders_compile(build):
    boundaries = cu_seqlens_of(LENGTHS)

    def loss(q, k, v):
        return attention(q, k, v, BUILDERS[build](boundaries, MODALITIES, SPANS)).square().sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = leaves()
    expected, got = (torch.autograd.grad(f(*inputs), inputs) for f in (loss, compiled))
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_options_compile(backend):
    def loss(q, k, v, bias, sink, slopes):
        mask = CROSS.with_positions(torch.arange(10))
        options = {"softcap": 2.0, "alibi_slopes": slopes, "pair_bias": bias, "sink": sink, "dropout_p": 0.25}
        return attention(q, k, v, mask, backend=backend, **options).square().sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = [*leaves(), *(torch.randn(shape, requires_grad=True) for shape in ((4, 2, 2), (4,), (4,)))]
    results = []
    for f in (loss, compiled):
        torch.manual_seed(5)
        results.append(torch.autograd.grad(f(*inputs), inputs))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("build", [name for name in BUILDERS if not name.startswith(("media", "cross"))])
def test_positions_compile(build):
    cu = cu_seqlens_of(LENGTHS)

    def loss(q, k, v, slopes):
        mask = BUILDERS[build](cu, MODALITIES, SPANS)
        return attention(q, k, v, mask, alibi_slopes=slopes).square().sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = [*leaves(), torch.rand(4, requires_grad=True)]
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
    bare = OPS.attention_fwd(q, k, v, *MASK.rows(10, 10), *NONE, backend)[0]
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


def test_dropout_is_replayed(backend):
    """Checkpointing, or anyone who restores torch's generator, gets the same mask; another state gives another."""
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
    for chunk_size in (2, 3):  # draws differ between chunkings, but the two passes of one must not
        torch.manual_seed(1)
        weight.grad = None
        GradCache([encoder], lambda e: e.square().sum(), chunk_size=chunk_size)(x)
        gradients.append(weight.grad.clone())
        torch.manual_seed(1)
        direct = sum(encoder(chunk).square().sum() for chunk in x.split(chunk_size))
        torch.testing.assert_close(gradients[-1], torch.autograd.grad(direct, weight)[0])
    assert not torch.equal(*gradients)


def test_autocast_as_sdpa():
    q, k, v = (x.detach() for x in leaves(kv_heads=4))
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(q, k, v).dtype == F.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("build", BUILDERS)
def test_no_host_sync_and_cuda_graphs(build):
    """Building, layout, forward and backward never wait for the device, so they can be captured."""
    cu = cu_seqlens_of(LENGTHS, "cuda")
    modalities, spans = MODALITIES.cuda(), SPANS.cuda()
    q, k, v = (x.detach().cuda().to(torch.bfloat16).requires_grad_() for x in leaves(dim=64))

    def step():
        out = attention(q, k, v, BUILDERS[build](cu, modalities, spans), sink=sink, dropout_p=0.25)
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
    assert not torch.equal(first[0], captured[0])  # the generator advances between replays
    assert all(torch.isfinite(x).all() for x in captured)
