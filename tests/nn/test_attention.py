"""The attention modules: equal to nn.MultiheadAttention where they compute the same, and to the functions they call."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmkernels.nn.attention_base as base_of_modules
from mmkernels import AttentionMask, attention, rotary_cos_sin
from mmkernels.nn import CoAttention, CrossModalAttention, FusedSelfAttention, GatedCrossAttention, Rotary
from mmkernels.testing.packing import cu_seqlens_of

E, H = 32, 4


def multihead(**options) -> nn.MultiheadAttention:
    theirs = nn.MultiheadAttention(E, H, batch_first=True, **options)
    for parameter in theirs.parameters():  # biases are initialised to zero: use other values here
        nn.init.normal_(parameter, std=0.3)
    return theirs


def gradients(out: Tensor, inputs: list[Tensor], module: nn.Module) -> list[Tensor]:
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    return list(torch.autograd.grad(out, [*inputs, module.out_proj.weight, module.out_proj.bias], grad))


def assert_equal_with_gradients(ours, theirs, inputs, ours_module, theirs_module) -> None:
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(
        gradients(ours, inputs, ours_module), gradients(theirs, inputs, theirs_module), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


# Beside nn.MultiheadAttention


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_self_attention_equals_multihead(bias, masked):
    theirs = multihead(bias=bias)
    ours = FusedSelfAttention.from_multihead_attention(theirs)
    x = torch.randn(2, 9, E, requires_grad=True)
    mask = AttentionMask.packed(cu_seqlens_of((4, 5, 9)), causal=True) if masked else None
    outputs = []
    for b in range(2):
        hidden = ~mask.to_dense(18, 18)[9 * b : 9 * b + 9, 9 * b : 9 * b + 9] if masked else None
        outputs.append(theirs(*(x[b],) * 3, attn_mask=hidden, need_weights=False)[0])
    expected = torch.stack(outputs)
    got = ours(x, mask)
    torch.testing.assert_close(got, expected)
    grad = torch.randn_like(expected)
    names = ["out_proj.weight"] + ["out_proj.bias"] * bias
    mine = [x, *(ours.get_parameter(name) for name in ["qkv_proj.weight", *["qkv_proj.bias"] * bias, *names])]
    yours = [x, *(theirs.get_parameter(name) for name in ["in_proj_weight", *["in_proj_bias"] * bias, *names])]
    for a, b in zip(torch.autograd.grad(got, mine, grad), torch.autograd.grad(expected, yours, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dims", [{}, {"kdim": 20, "vdim": 20}, {"kdim": 20, "vdim": 12}], ids=str)
def test_cross_attention_equals_multihead(dims):
    theirs = multihead(**dims)
    ours = CrossModalAttention.from_multihead_attention(theirs)
    x, context = torch.randn(7, E, requires_grad=True), torch.randn(11, dims.get("kdim", E), requires_grad=True)
    values = torch.randn(11, dims["vdim"], requires_grad=True) if dims.get("vdim", 0) != dims.get("kdim", 0) else None
    mask = AttentionMask.packed(cu_seqlens_of((3, 4)), cu_seqlens_of((5, 6)))
    given = context if values is None else values
    expected = theirs(x, context, given, attn_mask=~mask.to_dense(7, 11), need_weights=False)[0]
    got = ours(x, context, mask, values=values)
    inputs = [x, context] + ([] if values is None else [values])
    assert_equal_with_gradients(got, expected, inputs, ours, theirs)


def test_state_dict_of_a_model_that_holds_multihead():
    """Nested modules load by their names, strictly."""
    theirs = nn.ModuleDict({"inner": nn.ModuleDict({"cross": multihead(kdim=20, vdim=20), "own": multihead()})})
    ours = nn.ModuleDict(
        {"inner": nn.ModuleDict({"cross": CrossModalAttention(E, H, context_dim=20), "own": FusedSelfAttention(E, H)})}
    )
    state = theirs.state_dict()
    ours.load_state_dict(state)
    assert set(state) == set(theirs.state_dict())  # the caller's dict is unchanged
    x, context = torch.randn(5, E), torch.randn(6, 20)
    inner, other = ours["inner"], theirs["inner"]
    torch.testing.assert_close(inner["cross"](x, context), other["cross"](x, context, context)[0])
    torch.testing.assert_close(inner["own"](x), other["own"](x, x, x)[0])
    again = copy.deepcopy(ours)
    again.load_state_dict(ours.state_dict())  # and in their own layout


def test_a_state_dict_that_does_not_fit_is_refused():
    with pytest.raises(RuntimeError, match=r"q_norm\.weight"):
        FusedSelfAttention(E, H, qk_norm="rms").load_state_dict(multihead().state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        FusedSelfAttention(E, H, num_kv_heads=2).load_state_dict(multihead().state_dict())
    with pytest.raises(ValueError, match="add_bias_kv"):
        CrossModalAttention(E, H).load_state_dict(multihead(add_bias_kv=True).state_dict())
    for options in ({"add_bias_kv": True}, {"add_zero_attn": True}):
        with pytest.raises(ValueError, match="module: expected one without add_bias_kv"):
            CrossModalAttention.from_multihead_attention(multihead(**options))
    with pytest.raises(ValueError, match="module: expected kdim and vdim of embed_dim 32"):
        FusedSelfAttention.from_multihead_attention(multihead(kdim=20))
    with pytest.raises(TypeError, match=r"module: expected an nn\.MultiheadAttention"):
        CrossModalAttention.from_multihead_attention(nn.Linear(2, 2))


def test_from_multihead_keeps_mode_dropout_and_dtype():
    theirs = multihead(dropout=0.25).double().eval()
    ours = CrossModalAttention.from_multihead_attention(theirs, gate="channel", qk_norm="rms")
    assert (ours.dropout, ours.training, ours.q_proj.weight.dtype) == (0.25, False, torch.float64)
    assert not ours.gate.any()


def test_begins_as_multihead_does():
    torch.manual_seed(1)
    ours = CrossModalAttention(64, 4)
    bound = (6 / 128) ** 0.5
    for weight in (ours.q_proj.weight, ours.k_proj.weight, ours.v_proj.weight):
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert not any(getattr(ours, name).bias.any() for name in ("q_proj", "k_proj", "v_proj", "out_proj"))
    fused = FusedSelfAttention(64, 4, num_kv_heads=1)
    q, k, _ = fused.qkv_proj.weight.split([64, 16, 16])
    assert q.abs().max() <= bound < k.abs().max() <= (6 / 80) ** 0.5


# The functions they are made of


def test_norm_rotary_and_grouped_heads_by_hand():
    """Against a float64 composition: grouped heads, LayerNorm of q and k, M-RoPE, a head dim other than E / H."""
    rotary = Rotary(base=500.0, rotary_dim=12, sections=(2, 2, 2), section_layout="interleaved", interleaved=True)
    ours = FusedSelfAttention(E, H, num_kv_heads=2, head_dim=16, qk_norm="layer", rotary=rotary, dtype=torch.float64)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, ids = torch.randn(2, 6, E, dtype=torch.float64), torch.randint(0, 50, (3, 2, 6))
    cos, sin = rotary_cos_sin(
        ids, 12, base=500.0, sections=(2, 2, 2), section_layout="interleaved", dtype=torch.float64
    )
    q, k, v = ours.qkv_proj(x).split([64, 32, 32], -1)
    turned = []
    for rows, norm in ((q, ours.q_norm), (k, ours.k_norm)):
        rows = F.layer_norm(rows.unflatten(-1, (-1, 16)), (16,), norm.weight, norm.bias, 1e-6)
        pairs = torch.view_as_complex(rows[..., :12].unflatten(-1, (6, 2)).contiguous())
        pairs = torch.view_as_real(pairs * torch.complex(cos, sin)[:, :, None]).flatten(-2)
        turned.append(torch.cat([pairs, rows[..., 12:]], -1))
    heads = [t.transpose(1, 2) for t in (*turned, v.unflatten(-1, (2, 16)))]
    out = F.scaled_dot_product_attention(*heads, enable_gqa=True).transpose(1, 2).flatten(-2)
    expected = ours.out_proj(out)
    torch.testing.assert_close(ours(x, positions=ids), expected)
    torch.testing.assert_close(ours(x, positions=rotary.cos_sin(ids, 16, torch.float64)), expected)


def test_packed_equals_batched():
    ours = CrossModalAttention(E, H, context_dim=20, num_kv_heads=1, qk_norm="rms", rotary=Rotary())
    x, context = torch.randn(3, 5, E), torch.randn(3, 7, 20)
    here, there = torch.arange(5), torch.arange(7) + 2
    batched = ours(x, context, positions=here, context_positions=there)
    mask = AttentionMask.packed(cu_seqlens_of((5,) * 3), cu_seqlens_of((7,) * 3))
    packed = ours(
        x.flatten(0, 1), context.flatten(0, 1), mask, positions=here.repeat(3), context_positions=there.repeat(3)
    )  # fmt: skip
    torch.testing.assert_close(packed.view_as(batched), batched)
    assert ours(x, context, mask, positions=here, context_positions=there).shape == (3, 5, E)


def test_gates_begin_closed_and_open():
    x, context = torch.randn(6, E), torch.randn(9, 20)
    flamingo = GatedCrossAttention(E, H, context_dim=20)
    channels = CrossModalAttention(E, H, context_dim=20, gate="channel")
    for ours, size in ((flamingo, 1), (channels, E)):
        assert ours.gate.shape == (size,)
        assert torch.equal(ours(x, context), x)
        (grad,) = torch.autograd.grad(ours(x, context).square().sum(), ours.gate)
        assert grad.abs().min() > 0  # closed, but it learns
    nn.init.constant_(flamingo.gate, 0.7)
    plain = CrossModalAttention(E, H, context_dim=20)
    plain.load_state_dict({n: t for n, t in flamingo.state_dict().items() if n.split(".")[0] not in ("gate", "norm")})
    expected = x + torch.tensor(0.7).tanh() * plain(F.layer_norm(x, (E,)), context)
    torch.testing.assert_close(flamingo(x, context), expected)
    flamingo.reset_parameters()
    assert not flamingo.gate.any()


def test_coattention_is_two_cross_attentions():
    ours = CoAttention(E, 24, 4, qk_norm="rms")
    a, b = torch.randn(2, 5, E), torch.randn(2, 7, 24)
    mask_a = AttentionMask.packed(cu_seqlens_of((2, 3, 5)), cu_seqlens_of((3, 4, 7)))
    to_a, to_b = ours(a, b, mask_a)
    torch.testing.assert_close(to_a, ours.a_from_b(a, b, mask_a))
    torch.testing.assert_close(to_b, ours.b_from_a(b, a))
    assert (to_a.shape, to_b.shape) == (a.shape, b.shape)
    turned = CoAttention(E, 24, 4, rotary=Rotary(rotary_dim=4))
    out = turned(a, b, positions_a=torch.arange(5), positions_b=torch.arange(7))
    other = turned(a, b, positions_a=torch.arange(5) + 3, positions_b=torch.arange(7) + 3)
    torch.testing.assert_close(out, other)  # only the distance matters


def test_dropout_reaches_the_op_in_training_alone(monkeypatch):
    seen = []

    def spy(*args, dropout_p, **options):
        seen.append(dropout_p)
        return attention(*args, **options)

    monkeypatch.setattr(base_of_modules, "attention", spy)
    ours = FusedSelfAttention(E, H, dropout=0.2)
    ours(torch.randn(3, E))
    ours.eval()(torch.randn(3, E))
    assert seen == [0.2, 0.0]


# As torch uses modules

MODULES = [
    lambda: FusedSelfAttention(E, H, num_kv_heads=2, qk_norm="rms", rotary=Rotary()),
    lambda: GatedCrossAttention(E, H, qk_norm="layer", rotary=Rotary(), gate="channel"),
]


def run(module: nn.Module, x: Tensor) -> Tensor:
    ids = torch.arange(x.shape[0])
    if isinstance(module, FusedSelfAttention):
        return module(x, positions=ids)
    return module(x, x * 0.5, positions=ids, context_positions=ids)


def opened(make) -> nn.Module:
    module = make()
    if getattr(module, "gate", None) is not None:
        nn.init.normal_(module.gate)
    return module


@pytest.mark.parametrize("make", MODULES)
def test_compile_and_checkpoint(make):
    module, x = opened(make), torch.randn(6, E, requires_grad=True)
    leaves = [x, *module.parameters()]
    expected = torch.autograd.grad(run(module, x).square().sum(), leaves)
    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    again = torch.utils.checkpoint.checkpoint(run, module, x, use_reentrant=False)
    for out in (compiled(module, x), again):
        for a, b in zip(torch.autograd.grad(out.square().sum(), leaves), expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("make", MODULES)
def test_autocast_keeps_the_residual_wide(make):
    module, x = opened(make), torch.randn(6, E, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(module, x)
    assert out.dtype == (torch.float32 if isinstance(module, GatedCrossAttention) else torch.bfloat16)
    torch.testing.assert_close(out.float(), run(module, x), rtol=0.1, atol=0.1)
    grads = torch.autograd.grad(out.float().square().sum(), [x, *module.parameters()])
    assert all(torch.isfinite(grad).all() and grad.dtype == torch.float32 for grad in grads)


@pytest.mark.parametrize("make", MODULES)
def test_copies_pickles_and_devices(make):
    module, x = make(), torch.randn(4, E)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(run(other, x), run(module, x))
    assert run(make().bfloat16(), x.bfloat16()).dtype == torch.bfloat16
    meta = FusedSelfAttention(E, H, qk_norm="rms", device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in meta.parameters())
    meta.to_empty(device="cpu").reset_parameters()
    assert torch.equal(meta.q_norm.weight, torch.ones(8, dtype=torch.bfloat16))


MADE = {
    "cross": lambda: CrossModalAttention(E, H, gate="channel", qk_norm="layer", rotary=Rotary()),
    "flamingo": lambda: GatedCrossAttention(E, H),
    "both ways": lambda: CoAttention(E, E, H, gate="scalar", bias=False),
    "self": lambda: FusedSelfAttention(E, H, qk_norm="rms", num_kv_heads=2),
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_from_the_meta_device_as_made(make) -> None:
    """Nothing that to_empty leaves uninitialised is kept: the same numbers as in a freshly constructed module."""
    module, expected = make().to("meta").to_empty(device="cpu"), make()
    with torch.no_grad():
        for x in module.state_dict().values():
            x.fill_(torch.nan)
    for each in (module, expected):
        torch.manual_seed(3)
        each.reset_parameters()
    assert all(torch.equal(x, module.state_dict()[name]) for name, x in expected.state_dict().items())


# What a module attends to


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_probabilities_are_what_the_values_are_weighed_with(kv_heads):
    """P V through out_proj is what forward gives; packed, with norms and a rotary; a token may see nothing."""
    options = {"num_kv_heads": kv_heads, "qk_norm": "rms", "rotary": Rotary(), "dtype": torch.float64, "scale": 0.3}
    cross, own = CrossModalAttention(E, H, context_dim=20, **options), FusedSelfAttention(E, H, **options)
    x, context = torch.randn(7, E, dtype=torch.float64), torch.randn(6, 20, dtype=torch.float64)
    places, others = torch.tensor([0, 1, 2, 3, 0, 1, 2]), torch.tensor([0, 1, 0, 1, 2, 3])
    mask = AttentionMask.packed(cu_seqlens_of((4, 3)), cu_seqlens_of((0, 6)))
    causal = AttentionMask.packed(cu_seqlens_of((4, 3)), causal=True)
    of_cross = cross.probabilities(x, context, mask, positions=places, context_positions=others)
    of_own = own.probabilities(x, causal, positions=places)
    assert (of_cross.shape, of_own.shape) == ((H, 7, 6), (H, 7, 7))
    assert not of_cross[:, :4].any() and torch.allclose(of_cross[:, 4:].sum(-1), torch.ones(1, dtype=torch.float64))
    assert not of_own.triu(1).any()
    values = cross.v_proj(context), own.qkv_proj(x)[:, -kv_heads * own.head_dim :]
    for module, p, v, expected in (
        (cross, of_cross, values[0], cross(x, context, mask, positions=places, context_positions=others)),
        (own, of_own, values[1], own(x, causal, positions=places)),
    ):
        heads = v.unflatten(-1, (kv_heads, -1)).repeat_interleave(H // kv_heads, 1)
        mixed = torch.einsum("hqk,khd->qhd", p, heads).flatten(1)
        torch.testing.assert_close(module.out_proj(mixed), expected)


def test_probabilities_without_a_mask_and_of_wrong_shapes():
    gated = GatedCrossAttention(E, H)
    p = gated.probabilities(torch.randn(3, E), torch.randn(5, E))
    assert p.dtype == torch.float32
    torch.testing.assert_close(p.sum(-1), torch.ones(H, 3))
    with pytest.raises(ValueError, match=r"x: expected \[T, 32\] floating point"):
        gated.probabilities(torch.randn(2, 3, E), torch.randn(2, 5, E))
    with pytest.raises(ValueError, match=r"context: expected \[T, 32\]"):
        gated.probabilities(torch.randn(3, E), torch.randn(5, E + 1))
