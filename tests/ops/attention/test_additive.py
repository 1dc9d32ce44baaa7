"""Additive attention judged against float64 under every mask; how users call it, and their mistakes."""

import functools
from collections.abc import Callable
from dataclasses import replace

import backends
import named
import pairwise
import pytest
import torch

from mmkernels import AttentionMask, additive_attention, attention
from mmkernels.ops.attention.additive.op import additive_fwd
from mmkernels.ops.attention.types import Visible
from mmkernels.runtime.backends import BackendError
from mmkernels.testing import assert_as_accurate
from mmkernels.testing.attention import MASKS, MaskCase
from mmkernels.testing.attention_additive import (
    AdditiveInputs,
    gradient_terms,
    make_additive,
    plain_additive,
    run_additive,
)
from mmkernels.testing.attention_common import FAMILIES, share
from mmkernels.testing.packing import cu_seqlens_of

OPS = torch.ops.mmkernels

# The interpreter takes a millisecond per element of the head dim and pair of tiles: ragged, but few.
SMALL = {
    "dense": MaskCase((21,), (37,), lambda cu_q, cu_k: None),
    "packed": MaskCase((5, 20, 0, 1, 9)),
    "cross_causal": MaskCase((18, 0, 7), (3, 0, 34), options={"causal": True}),
    "window": MaskCase((30, 5), options={"causal": True, "window": 6}),
    "single": MaskCase((1,)),
}


def assert_right(
    draw: Callable[[int], AdditiveInputs],
    backend: str,
    *,
    with_lse: bool = False,
    case: object = "",
    device: str = "cpu",
) -> None:
    """`draw(seed)` three times, judged together: the largest error of few rows is noisy. A failure names the `case`."""
    inputs = [draw(seed) for seed in range(3)]
    got = [run_additive(x.on(device), backend, with_lse=with_lse) for x in inputs]  # plain PyTorch: on the CPU
    plain = [plain_additive(x, with_lse=with_lse) for x in inputs]
    truth = [plain_additive(x.double(), with_lse=with_lse) for x in inputs]
    terms = [gradient_terms(x, with_lse=with_lse) for x in inputs]
    if backend == "triton" and device != "cpu" and inputs[0].q.dtype == torch.float32:
        # With three tf32 products each term errs by a float32 rounding.
        for x, of_x in zip(inputs, terms, strict=True):
            of_x["out"] = plain_additive(replace(x.double(), v=x.v.double().abs()))["out"]
    for name in truth[0]:
        ours, theirs, true = (
            torch.stack([result[name].cpu() for result in results]) for results in (got, plain, truth)
        )
        if inputs[0].q.dtype == torch.float64:
            torch.testing.assert_close(
                ours, true, rtol=1e-11, atol=1e-11, msg=lambda m, name=name: f"{case} {name}: {m}"
            )
        elif true[torch.isfinite(true)].abs().max() > 1e-12:
            of_each = torch.stack([each[name] for each in terms]) if name in terms[0] else None
            assert_as_accurate(f"{case} {name}", ours, theirs, true, terms=of_each)
        else:
            assert ours[torch.isfinite(true)].abs().max() < 1e-5, f"{case} {name}"


def assert_mask(
    mask: str,
    dtype: torch.dtype,
    backend: str,
    masks: dict[str, MaskCase] = MASKS,
    dim: int = 12,
    *,
    device: str = "cpu",
    with_lse: bool = False,
) -> None:
    case = masks[mask]
    sizes = {"heads": 2, "kv_heads": 1, "dim": dim, "dtype": dtype, "mask": case.mask()}
    draw = functools.partial(make_additive, *case.tokens, **sizes)
    assert_right(lambda seed: draw(seed=seed), backend, with_lse=with_lse, case=mask, device=device)


@pytest.mark.parametrize("backend", ["native", "reference"])
@backends.every_dtype
def test_masks(dtype, backend):
    backends.need("attention", backend, dtype)
    for mask in ("dense", "packed", "cross", "cross_causal", "window", "tiny", "single"):
        assert_mask(mask, dtype, backend)


@pairwise.cases(
    mask=SMALL,
    dtype=(torch.float32, torch.bfloat16),
    only=lambda mask, dtype: dtype == torch.bfloat16 or mask in ("packed", "cross_causal"),
)
def test_masks_in_triton(mask, dtype):
    backends.need("attention", "triton", dtype)
    assert_mask(mask, dtype, "triton", SMALL, dim=5)


@backends.every
def test_head_dims(backend):
    backends.need("attention", backend)
    tokens, heads = ((18, 40), 1) if backends.interpreted(backend) else ((150, 90), 3)
    for dims in ((1, 1), (7, 33), (20, 16), (130, 64)):
        if backend != "triton" or max(dims) <= 128:  # its limit in float32
            sizes = {"heads": heads, "dim": dims[0], "dim_v": dims[1]}
            assert_right(lambda seed, sizes=sizes: make_additive(*tokens, **sizes, seed=seed), backend, case=dims)


@backends.every
def test_tanh_from_flat_to_saturated(backend):
    backends.need("attention", backend)
    case = SMALL["cross_causal"]
    for amplitude in (0.0, 0.1, 30.0):
        sizes = {"dim": 6, "amplitude": amplitude, "mask": case.mask()}
        assert_right(
            lambda seed, sizes=sizes: make_additive(*case.tokens, **sizes, seed=seed),
            backend,
            with_lse=True,
            case=amplitude,
        )


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_device(dtype, device):
    backends.need("attention", "triton", dtype, device)
    for i, mask in enumerate(MASKS):
        assert_mask(mask, dtype, "triton", dim=40, device=device, with_lse=mask != "single" and i % 2 == 0)
    for dims in ((1, 1), (7, 33), (20, 16), (128, 64)):
        draw = functools.partial(make_additive, 150, 90, heads=3, dim=dims[0], dim_v=dims[1], dtype=dtype)
        assert_right(lambda seed, draw=draw: draw(seed=seed), "triton", case=dims, device=device)
    for amplitude in (0.0, 0.1, 30.0):
        draw = functools.partial(make_additive, 400, 300, dim=24, amplitude=amplitude, dtype=dtype)
        assert_right(lambda seed, draw=draw: draw(seed=seed), "triton", with_lse=True, case=amplitude, device=device)


@pytest.mark.parametrize("mask", ["dense", "window"])
def test_tokens_with_much_in_common(mask):
    """Without an allowance for cancelling terms."""
    backends.need("attention", "native")
    case = {"dense": MaskCase((196,), build=lambda cu_q, cu_k: None), "window": MASKS["window"]}[mask]
    for family in FAMILIES:
        inputs = [share(make_additive(*case.tokens, dim=16, mask=case.mask(), seed=s), family, s) for s in range(6)]
        results = [(run_additive(x, "native"), plain_additive(x), plain_additive(x.double())) for x in inputs]
        for name in ("dq", "dk", "dw", "dbias"):
            three = (torch.stack([one[name] for one in these]) for these in zip(*results, strict=True))
            assert_as_accurate(f"{family} {name}", *three)


def spans_and_classes(tokens_q: int, tokens_k: int) -> Visible:
    """Random intervals, spans and classes, with queries that see nothing."""
    lo = torch.randint(0, tokens_k, (tokens_q,), dtype=torch.int32)
    hi = (lo + torch.randint(0, tokens_k, (tokens_q,), dtype=torch.int32)).clamp(max=tokens_k)
    first, last = torch.zeros(tokens_k, dtype=torch.int32), torch.full((tokens_k,), tokens_q, dtype=torch.int32)
    span_q, span_k = (torch.randint(0, 5, (n,), dtype=torch.int32) for n in (tokens_q, tokens_k))
    allow, bit = torch.randint(0, 4, (tokens_q,), dtype=torch.int32), 1 << torch.randint(0, 3, (tokens_k,))
    return Visible(lo, hi, first, last, span_q, span_k, allow, bit.int())


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("heads", [(1, 1), (4, 2)], ids=str)
def test_spans_and_classes(heads, backend):
    backends.need("attention", backend)
    tokens = (75, 150) if backend == "native" else (20, 40)
    x = make_additive(*tokens, heads=heads[0], kv_heads=heads[1], dim=6)
    mask = spans_and_classes(*tokens)
    assert 0.05 < mask.dense(tokens[1]).float().mean() < 0.5
    inputs = [t.detach().requires_grad_() for t in (x.q, x.k, x.v, x.w, x.bias)]
    results = []
    for name in (backend, "reference"):
        out, lse = additive_fwd(*inputs, mask, name)
        grad_lse = torch.where(torch.isfinite(lse), x.grad_lse, 0.0)
        results.append([out, lse, *torch.autograd.grad([out, lse], inputs, [x.grad_out, grad_lse])])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-5)


@backends.every
def test_a_query_that_sees_nothing(backend):
    backends.need("attention", backend)
    mask = AttentionMask.packed(cu_seqlens_of((2, 3)), cu_seqlens_of((0, 4)))
    q, k, v = (torch.randn(tokens, 2, 8, requires_grad=True) for tokens in (5, 4, 4))
    out, lse = additive_attention(q, k, v, torch.randn(8), mask, return_lse=True, backend=backend)
    assert not out[:2].any()
    assert (lse[:, :2] == -torch.inf).all()
    grads = torch.autograd.grad(out.sum() + lse[:, 2:].sum(), (q, k, v))
    assert not grads[0][:2].any()
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_as_a_score_of_attention():
    x = make_additive(9, 9, heads=2, dim=8, mask=AttentionMask.packed(cu_seqlens_of((4, 5))))
    expected = additive_attention(x.q, x.k, x.v, x.w, x.mask, bias=x.bias, return_lse=True)
    score = {"score": "additive", "score_weight": x.w, "score_bias": x.bias}
    with pytest.warns(DeprecationWarning, match=r"score is deprecated: call additive_attention\(") as warned:
        got = attention(x.q, x.k, x.v, x.mask, **score, return_lse=True)
    assert [w.filename for w in warned] == [__file__]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    with pytest.warns(DeprecationWarning, match="score is deprecated: leave it out"):
        assert torch.equal(attention(x.q, x.k, x.v, score="dot"), attention(x.q, x.k, x.v))
    with pytest.raises(ValueError, match="score: expected None, 'dot' or 'additive', got 'cosine'"):
        attention(x.q, x.k, x.v, score="cosine")
    with pytest.raises(ValueError, match=r"score_weight: expected \[H, D\] or \[D\] .* got None"):
        attention(x.q, x.k, x.v, score="additive")
    with pytest.raises(ValueError, match="score_bias: expected None without score='additive'"):
        attention(x.q, x.k, x.v, score_bias=x.bias)
    for option in ({"scale": 0.5}, {"dropout_p": 0.1}, {"sink": torch.zeros(2)}, {"pair_bias": torch.zeros(2, 1, 1)}):
        refused = pytest.raises(NotImplementedError, match=f"{next(iter(option))} with score='additive'")
        with pytest.warns(DeprecationWarning, match="score is deprecated"), refused:
            attention(x.q, x.k, x.v, **score, **option)


@backends.every
def test_empty(backend):
    backends.need("attention", backend)
    for tokens_q, tokens_k in ((0, 0), (0, 3), (3, 0)):
        q, k, v = (torch.randn(t, 2, 8, requires_grad=True) for t in (tokens_q, tokens_k, tokens_k))
        w = torch.randn(2, 8, requires_grad=True)
        out = additive_attention(q, k, v, w, backend=backend)
        assert out.shape == (tokens_q, 2, 8)
        assert not out.any()
        for grad, x in zip(torch.autograd.grad(out.sum(), (q, k, v, w)), (q, k, v, w), strict=True):
            assert grad.shape == x.shape
            assert not grad.any()


def test_samples_do_not_see_each_other():
    backends.need("attention", "native")
    case = MASKS["packed_causal"]
    x = make_additive(*case.tokens, mask=case.mask())
    before = run_additive(x, "native")
    for poison in (1e30, torch.nan):
        for t in (x.q, x.k, x.v, x.grad_out):
            t[76:206] = poison
        after = run_additive(x, "native")
        for name in ("out", "dq", "dk", "dv"):
            assert torch.equal(after[name][:76], before[name][:76])
            assert torch.equal(after[name][206:], before[name][206:])


@backends.every
def test_strides_batches_and_shared_weights(backend):
    backends.need("attention", backend)
    q, k, v = torch.randn(3, 4, 5, 8).transpose(1, 2), torch.randn(3, 7, 2, 8), torch.randn(3, 7, 2, 16)[..., ::2]
    w, bias = torch.randn(8), torch.randn(8)
    out, lse = additive_attention(q, k, v, w, bias=bias, return_lse=True, backend=backend)
    assert out.shape == (3, 5, 4, 8)
    assert lse.shape == (3, 4, 5)
    for b in range(3):
        one, one_lse = additive_attention(
            q[b].contiguous(), k[b], v[b].contiguous(), w.expand(4, 8), bias=bias.expand(4, 8), return_lse=True,
            backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(out[b], one)
        torch.testing.assert_close(lse[b], one_lse)


def test_same_bits_with_any_number_of_threads():
    backends.need("attention", "native")
    case, threads, results = MASKS["cross"], torch.get_num_threads(), []
    x = make_additive(*case.tokens, heads=4, kv_heads=2, mask=case.mask())
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run_additive(x, "native"))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(other[name], results[0][name]) for name in other)


def test_memory_is_of_the_tokens():
    """2048 x 2048 pairs times 32 elements of the head dim would take 512 MB."""
    backends.need("attention", "native")
    x = make_additive(2048, 2048, heads=1, dim=32, mask=AttentionMask.packed(cu_seqlens_of([16] * 128)))
    with torch.profiler.profile(profile_memory=True) as profile:
        run_additive(x, "native")
    assert max(event.cpu_memory_usage for event in profile.key_averages()) < 8 * 2**20


# As torch sees it


MASK = AttentionMask.packed(cu_seqlens_of((3, 0, 6, 1)), causal=True)


def leaves():
    x = make_additive(10, 10, heads=2, kv_heads=1, dim=4)
    return [t.requires_grad_() for t in (x.q, x.k, x.v, x.w, x.bias)]


@backends.every
def test_opcheck(backend):
    backends.need("attention", backend)
    rows = MASK.rows(10, 10)[:4]
    for mask in (Visible(*rows), spans_and_classes(10, 10)):
        torch.library.opcheck(OPS.attention_additive_fwd.default, (*leaves(), *mask, backend))
        inputs = [t.detach() for t in leaves()]
        out, lse = additive_fwd(*inputs, mask, backend)
        for grad_lse in (torch.randn_like(lse), None):
            args = (torch.randn_like(out), grad_lse, *inputs, out, lse, *mask, backend)
            torch.library.opcheck(OPS.attention_additive_bwd.default, args)


@backends.every
def test_compile_functorch_and_checkpoint(backend):
    backends.need("attention", backend)

    def loss(q, k, v, w, bias):
        out, lse = additive_attention(q, k, v, w, MASK, bias=bias, return_lse=True, backend=backend)
        return out.square().sum() + lse.sum()

    inputs = leaves()
    expected = torch.autograd.grad(loss(*inputs), inputs)
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got in (
        torch.autograd.grad(compiled(*inputs), inputs),
        torch.func.grad(loss, argnums=(0, 1, 2, 3, 4))(*(x.detach() for x in inputs)),
        torch.autograd.grad(torch.utils.checkpoint.checkpoint(loss, *inputs, use_reentrant=False), inputs),
    ):
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


# User mistakes

Q, K, V, W = torch.randn(5, 4, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8), torch.randn(4, 8)
BAD = {
    "q": [
        (dict(q=None), TypeError, r"q: expected \[Tq, H, D\] or \[B, Tq, H, D\] floating point, got None"),
    ],
    "k": [
        (dict(k=K.double()), TypeError, r"k: expected \[Tk, Hkv, D\] float32, got .*float64"),
        (dict(k=K[..., :7]), ValueError, "k: expected head dim D=8 like q"),
        (dict(k=torch.randn(5, 3, 8)), ValueError, "k: expected a number of heads Hkv that divides q's 4"),
    ],
    "v": [
        (dict(v=V[:4]), ValueError, r"v: expected \[5, 2, 'Dv'\] like k"),
    ],
    "w": [
        (dict(w=torch.randn(2, 8)), ValueError, r"w: expected \[4, 8\] or \[8\] float32, got \[2, 8\]"),
        (dict(w=W.double()), TypeError, "w: expected .* float32, got .*float64"),
    ],
    "bias": [
        (dict(bias=torch.randn(7)), ValueError, r"bias: expected \[4, 8\] or \[8\]"),
    ],
    "mask": [
        (dict(mask=torch.ones(5, 5)), TypeError, "mask: expected an AttentionMask or None"),
    ],
    "return_lse": [
        (dict(return_lse=1), TypeError, "return_lse: expected a bool"),
    ],
    "backend": [
        (dict(backend="cudnn"), ValueError, "backend: expected None or one of"),
    ],
}


@pytest.mark.parametrize("argument", BAD)
def test_a_mistake_is_named(argument):
    given = dict(q=Q, k=K, v=V, w=W)
    named.mistakes(
        *((lambda wrong=wrong: additive_attention(**(given | wrong)), *expected) for wrong, *expected in BAD[argument])
    )


def test_triton_says_why_it_cannot_serve():
    x = torch.randn(3, 1, 300)
    with pytest.raises(BackendError, match=r"(?s)backend='triton' does not support.*head dims up to 128"):
        additive_attention(x, x, x, x[0], backend="triton")
