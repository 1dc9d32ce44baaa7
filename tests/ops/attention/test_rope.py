"""The prologue: norm and rotary embedding judged against float64; how users call it, and their mistakes."""

import math

import backends
import named
import pytest
import torch
from backends import DTYPES

from mmkernels import norm_rope, qk_norm_rope, rotary_cos_sin
from mmkernels.runtime.backends import BackendError
from mmkernels.testing import assert_as_accurate
from mmkernels.testing.attention_rows import Rows, differentiate, norm_rope_rows, plain_norm_rope

OPS = torch.ops.mmkernels


def assert_right(draws: list[Rows], backend: str, case: object, device: str = "cpu") -> None:
    """Compare a backend with the truth over all draws together; a failure names the `case`."""
    got = [differentiate(rows.on(device), lambda **kwargs: norm_rope(**kwargs, backend=backend)) for rows in draws]
    plain = [differentiate(rows, plain_norm_rope) for rows in draws]
    truth = [differentiate(rows.double(), plain_norm_rope) for rows in draws]
    for name in truth[0]:
        ours, theirs, true = (
            torch.stack([result[name].cpu() for result in results]) for results in (got, plain, truth)
        )
        if true.dtype == draws[0].grad_out.dtype:
            torch.testing.assert_close(
                ours, true, rtol=1e-11, atol=1e-11, msg=lambda m, name=name: f"{case} {name}: {m}"
            )
        else:
            assert_as_accurate(f"{case} {name}", ours, theirs, true)


# tokens, heads, D, R, norm, weight and bias, interleaved
CASES = {
    "qwen": (37, 6, 64, 64, "rms", True, False),
    "half_of_the_head": (37, 3, 80, 40, "layer", True, False),
    "neighbours": (23, 2, 72, 72, "layer", True, True),
    "neighbours_in_part": (23, 2, 40, 20, "rms", True, True),
    "no_weight": (19, 4, 128, 128, "rms", False, False),
    "rotation_alone": (19, 4, 96, 96, None, False, False),
    "neighbours_alone": (19, 1, 34, 22, None, False, True),
    "norm_alone": (19, 3, 33, 0, "layer", True, False),
    "many_strips": (700, 4, 48, 48, "rms", True, False),
    "one": (1, 1, 2, 2, "rms", True, False),
    "one_element": (5, 2, 1, 0, "layer", True, False),
    "wide": (9, 2, 300, 256, "layer", True, False),
}


def assert_case(case: str, dtype: torch.dtype, backend: str, device: str = "cpu", factor: int = 1) -> None:
    tokens, heads, dim, rotary, norm, affine, interleaved = CASES[case]
    if backends.interpreted(backend, device) and case == "many_strips":
        tokens = 300  # two programs of the backward; the interpreter is slow
    tokens *= factor
    options = {"rotary_dim": rotary, "norm": norm, "affine": affine, "interleaved": interleaved, "dtype": dtype}
    draws = 1 + (20 if backends.interpreted(backend, device) else 100) // (tokens * heads * dim)  # noisy: few elements
    rows = [norm_rope_rows(tokens, heads, dim, **options, seed=seed) for seed in range(draws)]
    assert_right(rows, backend, case, device)


@pytest.mark.parametrize("backend", ["native", "reference"])
@backends.every_dtype
def test_against_float64(dtype, backend):
    backends.need("attention", backend, dtype)
    for case in CASES:
        assert_case(case, dtype, backend)


@pytest.mark.parametrize("case", CASES)
def test_against_float64_in_triton(case):
    """Cycle through the dtypes: a kernel only reads and writes them, and computes in float32."""
    dtype = DTYPES[list(CASES).index(case) % 3]
    backends.need("attention", "triton", dtype)
    assert_case(case, dtype, "triton")


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_on_a_device(dtype, device):
    backends.need("attention", "triton", dtype, device)
    for case in CASES:
        for times in (1, 8):
            assert_case(case, dtype, "triton", device, times)


# The calls


@backends.every
def test_q_and_k_batched_and_packed(backend):
    backends.need("attention", backend)
    q, k = torch.randn(2, 7, 6, 32), torch.randn(2, 7, 2, 32)
    weights = {"q_weight": torch.rand(32), "k_weight": torch.rand(32)}
    position = torch.randint(0, 100, (2, 7))
    got = qk_norm_rope(q, k, position, **weights, backend=backend)
    table = rotary_cos_sin(position, 32)
    given = qk_norm_rope(q, k, cos_sin=table, **weights, backend=backend)
    packed = qk_norm_rope(q.flatten(0, 1), k.flatten(0, 1), position.flatten(), **weights, backend=backend)
    for x, name, ours, same, flat in zip((q, k), weights, got, given, packed, strict=True):
        expected = plain_norm_rope(
            x.flatten(0, 1), weights[name], None, cos_sin=tuple(t.flatten(0, 1) for t in table), norm="rms", eps=1e-6,
            interleaved=False,
        )  # fmt: skip
        torch.testing.assert_close(flat, expected)
        assert torch.equal(ours, flat.view_as(ours))
        assert torch.equal(same, ours)
    shared = norm_rope(q, position[0], weight=weights["q_weight"], backend=backend)  # [T]: the same for every sample
    assert torch.equal(shared[0], got[0][0])
    assert torch.equal(shared[1], norm_rope(q[1], position[0], weight=weights["q_weight"], backend=backend))


@backends.every
def test_strides(backend):
    backends.need("attention", backend)
    fused = torch.randn(7, 8, 16)
    q, k = fused[:, :4], fused[:, 4:6]
    position = torch.arange(7)
    expected = qk_norm_rope(q.contiguous(), k.contiguous(), position, backend=backend)
    columns = torch.stack([q, q + 1], -1)[..., 0]
    heads_first = q.transpose(0, 1).contiguous().transpose(0, 1)
    for other in (q, columns, heads_first):
        got = qk_norm_rope(other, k, position, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert got[0].is_contiguous()
    x = q.clone().requires_grad_()
    out = norm_rope(x, position, backend=backend)
    (dense,) = torch.autograd.grad(out, x, torch.ones_like(out), retain_graph=True)
    (spread,) = torch.autograd.grad(out, x, torch.ones(()).expand_as(out))
    assert torch.equal(dense, spread)


@backends.every
def test_empty_and_inputs_untouched(backend):
    backends.need("attention", backend)
    x, weight = torch.randn(0, 3, 8, requires_grad=True), torch.rand(8, requires_grad=True)
    out = norm_rope(x, torch.zeros(0, dtype=torch.int64), weight=weight, backend=backend)
    assert out.shape == x.shape
    dx, dweight = torch.autograd.grad(out.sum(), (x, weight))
    assert dx.shape == x.shape
    assert not dweight.any()
    y = torch.randn(3, 1, 8)
    before = y.clone()
    norm_rope(y, torch.arange(3), norm=None, backend=backend).zero_()
    assert torch.equal(y, before)


@backends.every
def test_nan_and_huge_stay_in_their_row(backend):
    backends.need("attention", backend)
    x = torch.randn(4, 2, 16)
    position = torch.arange(4)
    before = norm_rope(x, position, backend=backend)
    x[1, 0, 3], x[2, 1] = math.nan, 1e18
    after = norm_rope(x, position, backend=backend)
    assert after[1, 0].isnan().all()
    keep = torch.ones(4, 2, dtype=torch.bool)
    keep[1, 0] = keep[2, 1] = False
    assert torch.equal(after[keep], before[keep])
    assert torch.isfinite(after[2]).all()


def test_same_bits_with_any_number_of_threads():
    backends.need("attention", "native")
    rows, threads = norm_rope_rows(900, 3, 64, rotary_dim=64, norm="layer"), torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(differentiate(rows, lambda **kwargs: norm_rope(**kwargs, backend="native")))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(other[name], results[0][name]) for name in other)


def test_low_precision_weights():
    x, weight = torch.randn(5, 2, 8, dtype=torch.bfloat16), torch.rand(8).bfloat16().requires_grad_()
    out = norm_rope(x, torch.arange(5), weight=weight)
    assert torch.equal(out, norm_rope(x, torch.arange(5), weight=weight.detach().float()))
    assert torch.autograd.grad(out.sum(), weight)[0].dtype == torch.bfloat16


# As torch sees it


backend = backends.fixture("attention")


def leaves():
    return (
        torch.randn(6, 2, 8, requires_grad=True),
        torch.rand(8, requires_grad=True),
        torch.rand(8, requires_grad=True),
    )


def test_opcheck(backend):
    x, weight, bias = leaves()
    cos, sin = rotary_cos_sin(torch.arange(6), 6)
    layer, rms = ("layer", 1e-5, False, backend), ("rms", 1e-5, True, backend)
    torch.library.opcheck(OPS.attention_norm_rope_fwd.default, (x, cos, sin, weight, bias, *layer))
    torch.library.opcheck(OPS.attention_norm_rope_fwd.default, (x, None, None, None, None, *rms))
    torch.library.opcheck(OPS.attention_norm_rope_fwd.default, (x, cos, sin, None, None, "", 0.0, True, backend))
    x, weight, grad = x.detach(), weight.detach(), torch.randn(6, 2, 8)
    torch.library.opcheck(OPS.attention_norm_rope_bwd.default, (grad, x, cos, sin, weight, *layer))
    torch.library.opcheck(OPS.attention_norm_rope_bwd.default, (grad, x, None, None, None, *rms))
    torch.library.opcheck(OPS.attention_norm_rope_bwd.default, (grad, None, cos, sin, None, "", 0.0, False, backend))


def test_fullgraph_compile(backend):
    def loss(x, weight, bias, position):
        q, k = qk_norm_rope(x, x[:, :1], position, norm="layer", q_weight=weight, q_bias=bias, backend=backend)
        return (q.square().sum(-1) * k.sum(-1)).sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs, position = leaves(), torch.arange(6)
    expected, got = (torch.autograd.grad(f(*inputs, position), inputs) for f in (loss, compiled))
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_functorch_bare_op_and_checkpoint(backend):
    position = torch.arange(6)

    def loss(x, weight):
        return norm_rope(x, position, weight=weight, backend=backend).pow(3).sum()

    x, weight, _ = leaves()
    expected = torch.autograd.grad(loss(x, weight), (x, weight))
    got = torch.func.grad(loss, argnums=(0, 1))(x.detach(), weight.detach())
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    batch = torch.randn(3, 6, 2, 8)
    rows = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None))(batch, weight.detach())
    assert torch.equal(rows[1], torch.func.grad(loss)(batch[1], weight.detach()))
    again = torch.utils.checkpoint.checkpoint(loss, x, weight, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again, x)[0], expected[0])
    bare = OPS.attention_norm_rope_fwd(x, *rotary_cos_sin(position, 8), weight, None, "rms", 1e-6, False, backend)
    assert torch.equal(torch.autograd.grad(bare.pow(3).sum(), x)[0], expected[0])


def test_rotation_alone_keeps_no_input(backend):
    x = torch.randn(4, 1, 8, requires_grad=True)
    out = norm_rope(x * 1, torch.arange(4), norm=None, backend=backend)
    assert all(saved is None or saved.shape != x.shape for saved in out.grad_fn.next_functions[0][0].saved_tensors)


# User mistakes

Q, K, P = torch.randn(5, 4, 8), torch.randn(5, 2, 8), torch.arange(5)
COS_SIN = rotary_cos_sin(P, 8)
BAD = {
    "q": [
        (dict(q=Q[0]), ValueError, r"q: expected \[T, H, D\] or \[B, T, H, D\] floating point, got \[4, 8\]"),
        (dict(q=Q.int()), TypeError, "q: expected .* floating point, got .*int32"),
    ],
    "k": [
        (dict(k=K.double()), TypeError, r"k: expected \[T, Hkv, D\] float32, got .*float64"),
        (dict(k=K[:4]), ValueError, r"k: expected \[5, 'Hkv', 8\] like q"),
        (dict(k=K[..., :6]), ValueError, r"k: expected \[5, 'Hkv', 8\] like q"),
    ],
    "position_ids": [
        (
            dict(position_ids=P[:4]),
            ValueError,
            r"position_ids: expected \[T\] or \[B, T\] for the tokens of \[5, 4, 8\]",
        ),
        (dict(position_ids=P.bfloat16()), TypeError, "position_ids: expected .*, got .*bfloat16"),
        (dict(position_ids=P.expand(3, 5)), ValueError, "position_ids: expected .* for the tokens of"),
        (dict(sections=[2, 2]), ValueError, r"position_ids: expected \[2, T\] or \[2, B, T\]"),
    ],
    "cos_sin": [
        (dict(cos_sin=COS_SIN), ValueError, "cos_sin: expected None with position_ids"),
        (dict(position_ids=None, cos_sin=COS_SIN[0]), TypeError, r"cos_sin: expected two tensors"),
        (dict(position_ids=None, cos_sin=(COS_SIN[0].bfloat16(),) * 2), TypeError, "cos_sin: expected .*float32, as"),
        (
            dict(position_ids=None, cos_sin=(COS_SIN[0], COS_SIN[1][:, :3])),
            ValueError,
            "cos_sin: expected sin of cos's",
        ),
        (dict(position_ids=None, cos_sin=(torch.cat(COS_SIN, 1),) * 2), ValueError, "cos_sin: expected R/2 columns"),
        (
            dict(position_ids=None, cos_sin=tuple(t[:3] for t in COS_SIN)),
            ValueError,
            "cos_sin: expected .* for the tokens",
        ),
    ],
    "base": [
        (dict(position_ids=None, base=1e6), ValueError, "base: expected None without position_ids, got 1000000.0"),
        (dict(base=0), ValueError, "base: expected a positive finite number"),
    ],
    "sections": [
        (dict(position_ids=None, cos_sin=COS_SIN, sections=[4]), ValueError, "sections: expected None without pos"),
        (
            dict(sections=[2, 1], position_ids=P.expand(2, 5)),
            ValueError,
            "sections: expected .* sum to rotary_dim / 2 = 4",
        ),
        (dict(sections="ab"), TypeError, "sections: expected a sequence of ints"),
        (
            dict(sections=[1, 3], position_ids=P.expand(2, 5), section_layout="interleaved"),
            ValueError,
            "sections: expected at most 2 interleaved frequencies of axis 1",
        ),
    ],
    "norm": [
        (dict(position_ids=None, norm=None), ValueError, "norm: expected 'rms' or 'layer' without position_ids"),
        (dict(norm="batch"), ValueError, "norm: expected 'rms', 'layer' or None"),
    ],
    "rotary_dim": [
        (dict(rotary_dim=10), ValueError, "rotary_dim: expected at most the head dim D=8, got 10"),
        (dict(rotary_dim=3), ValueError, "rotary_dim: expected an even number"),
        (dict(rotary_dim=4.0), TypeError, "rotary_dim: expected an even int"),
    ],
    "inv_freq": [
        (dict(inv_freq=torch.rand(3)), ValueError, r"inv_freq: expected \[4\] float32 or float64, got \[3\]"),
        (dict(inv_freq=torch.rand(4, requires_grad=True)), NotImplementedError, "inv_freq: not supported yet"),
    ],
    "section_layout": [
        (dict(section_layout="interleaved"), ValueError, "section_layout: expected sections with 'interleaved'"),
        (dict(section_layout="woven"), ValueError, "section_layout: expected 'contiguous' or 'interleaved'"),
    ],
    "interleaved": [
        (dict(interleaved=1), TypeError, "interleaved: expected a bool"),
    ],
    "eps": [
        (dict(eps=-1.0), ValueError, "eps: expected a finite number of at least 0"),
        (dict(eps="x"), TypeError, "eps: expected a float"),
    ],
    "q_weight": [
        (dict(q_weight=torch.rand(7)), ValueError, r"q_weight: expected \[8\] float32, got \[7\]"),
        (dict(norm=None, q_weight=torch.rand(8)), ValueError, "q_weight: expected None with norm=None"),
    ],
    "k_weight": [
        (dict(k_weight=torch.rand(8).double()), TypeError, r"k_weight: expected \[8\] float32"),
    ],
    "q_bias": [
        (dict(q_bias=torch.rand(8)), ValueError, "q_bias: expected None with norm='rms'"),
    ],
    "backend": [
        (dict(backend="cudnn"), ValueError, "backend: expected None or one of"),
    ],
}


@pytest.mark.parametrize("argument", BAD)
def test_a_mistake_is_named(argument):
    given = dict(q=Q, k=K, position_ids=P)
    named.mistakes(
        *((lambda wrong=wrong: qk_norm_rope(**(given | wrong)), *expected) for wrong, *expected in BAD[argument])
    )


def test_a_backend_that_cannot_serve_says_why():
    with pytest.raises(BackendError, match=r"(?s)backend='triton' does not support.*reference: supported"):
        norm_rope(torch.randn(3, 1, 2000), backend="triton")
