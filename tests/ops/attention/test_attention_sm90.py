"""The attention kernels for compute capability 9.0, emulated and on a device: accuracy, layouts, the same bits."""

import itertools
from dataclasses import replace

import pairwise
import pytest
import torch
from torch import Tensor

from mmkernels.ops.attention import AttentionMask
from mmkernels.ops.attention.tiles import FULL, PARTIAL, SKIP, tile_states
from mmkernels.testing import assert_as_accurate
from mmkernels.testing.attention import MASKS, AttentionInputs, make_inputs, plain, run
from mmkernels.testing.packing import cu_seqlens_of

LOW = (torch.bfloat16, torch.float16)


@pytest.fixture
def sm90(cuda):
    """Sets an emulated device's capability to 9.0; skips a real device with another one."""
    if cuda.emulator is None and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the device is no sm_90")
    cuda.capability(90)
    yield cuda
    cuda.capability(80)


def inputs(mask: str, device: str, **options: object) -> AttentionInputs:
    case = MASKS[mask]
    return make_inputs(*case.tokens, mask=case.mask(device), device=device, **options)


def assert_right(
    cuda: object, x: AttentionInputs, *, with_lse: bool = True, sm90: bool = True, case: object = ""
) -> None:
    """Forward and backward against float64, with the sm_90 kernels only (or without them). A failure names the
    `case`."""
    if cuda.emulator is not None:
        cuda.emulator.reset_counts()
    actual = dict(run(x, "native", with_lse=with_lse).items())
    if cuda.emulator is not None:
        counts = cuda.emulator.counts()
        ours, others = counts["warpgroup_products"], counts["matrix_products"]
        assert (ours > 0 and others == 0) if sm90 else (ours == 0 and others > 0), case
    truth = dict(plain(x.to(torch.float64), with_lse=with_lse).items())
    for name, expected in plain(x, with_lse=with_lse).items():
        assert actual[name].shape == truth[name].shape, f"{case} {name}"
        if truth[name].count_nonzero() > 0:
            assert_as_accurate(f"{case} {name}", actual[name], expected, truth[name])
        else:
            assert name in ("dq", "dk"), f"{case} {name}"
            assert actual[name].abs().max() <= 1e-6 * x.grad_out.abs().max() * x.v.abs().max(), f"{case} {name}"


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("dim", (64, 128))
def test_masks(sm90, dim, dtype):
    for mask in MASKS:
        # With one score per head a gradient of lse is one rounding of ds to 16 bits: no statistics to compare.
        with_lse = mask != "single"
        assert_right(sm90, inputs(mask, sm90.device, dtype=dtype, dim=dim), with_lse=with_lse, case=mask)


def test_head_dims(sm90):
    """TMA pads to 64 and 128; out-of-bounds elements are not written either."""
    for dims in ((8, 8), (72, 72), (80, 80), (96, 96), (128, 64), (40, 112)):
        x = inputs("packed_causal", sm90.device, dtype=torch.bfloat16, dim=dims[0], dim_v=dims[1])
        assert_right(sm90, x, case=dims)


@pairwise.cases(mask=("packed_causal", "noise"), heads=((4, 2), (6, 1)), dtype=LOW)
def test_grouped_heads(sm90, mask, heads, dtype):
    assert_right(sm90, inputs(mask, sm90.device, dtype=dtype, heads=heads[0], kv_heads=heads[1], dim=64))


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_logits_from_flat_to_one_hot(sm90, dtype):
    for amplitude in (0.0, 10.0, 300.0):
        x = inputs("cross", sm90.device, dtype=dtype, amplitude=amplitude, dim=64)
        assert_right(sm90, x, with_lse=False, case=amplitude)


@pytest.mark.parametrize("mask", ("packed", "cross_only"))
def test_scale(sm90, mask):
    for scale in (-0.3, 0.0, 1.0):
        x = inputs(mask, sm90.device, scale=scale, dim=64, dtype=torch.bfloat16)
        assert_right(sm90, x, with_lse=False, case=scale)


@pairwise.cases(
    mask=("packed_causal", "noise", "cross"), dim=(64, 128), dtype=LOW, softcap=((1.5, 1.0), (20.0, 40.0), (1e4, 10.0))
)
def test_softcap(sm90, mask, dim, dtype, softcap):
    """A cap that bends some products, one that bends all (the derivative is far below the rounding of 1), and one that
    bends none."""
    options = {"softcap": softcap[0], "amplitude": softcap[1], "scale": -0.3}
    x = inputs(mask, sm90.device, dtype=dtype, heads=4, kv_heads=2, dim=dim, **options)
    assert_right(sm90, x, case=(mask, options))


def blocky_mask(seed: int, tokens_q: int, tokens_k: int, device: str) -> AttentionMask:
    """Random intervals, spans and classes in runs: tiles of all three states, and rows that see nothing."""
    generator = torch.Generator().manual_seed(seed)

    def runs(tokens: int, values: int, longest: int) -> Tensor:
        lengths = torch.randint(1, longest, (tokens,), generator=generator)
        ids = torch.randint(0, values, (tokens,), generator=generator)
        return ids.repeat_interleave(lengths)[:tokens].int()

    longest = (300, 90, 4)[seed % 3]
    lo = runs(tokens_q, tokens_k // 2, longest)
    hi = torch.minimum(lo + runs(tokens_q, tokens_k, longest), torch.tensor(tokens_k)).int()
    allow = runs(tokens_q, 4, longest)
    given = {"span_q": runs(tokens_q, 3, longest), "span_k": runs(tokens_k, 3, longest), "allow_q": allow}
    given["class_k"] = runs(tokens_k, 3, longest)
    return AttentionMask.from_rows(lo.to(device), hi.to(device), **{name: x.to(device) for name, x in given.items()})


# Three seeds per kernel, each with other run lengths.
SEEDS = {(64, LOW[0]): (0, 1, 2), (128, LOW[0]): (3, 4, 5), (64, LOW[1]): (6, 7, 8), (128, LOW[1]): (9, 10, 11)}


def random_tokens(seed: int) -> list[int]:
    return torch.randint(1, 420, (2,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize(("dim", "dtype"), SEEDS, ids=str)
def test_random_patterns(sm90, dim, dtype):
    for seed in SEEDS[dim, dtype]:
        tokens = random_tokens(seed)
        mask = blocky_mask(seed, *tokens, sm90.device)
        sizes = {"dim": dim, "dtype": dtype, "heads": 2, "kv_heads": 1}
        x = make_inputs(*tokens, mask=mask, **sizes, device=sm90.device, seed=seed)
        assert_right(sm90, x, case=seed)
        blind = ~mask.to_dense(*tokens).any(1)
        result = run(x, "native")
        assert (result.out[blind] == 0).all() and (result.dq[blind] == 0).all(), seed
        assert (result.lse[:, blind] == -torch.inf).all(), seed


def test_random_patterns_meet_every_state():
    """Otherwise the test above shows less than it seems to."""
    met = set()
    for seed in itertools.chain(*SEEDS.values()):
        tokens = random_tokens(seed)
        met |= set(tile_states(blocky_mask(seed, *tokens, "cpu").rows(*tokens), tokens[1]).flatten().tolist())
    assert met == {SKIP, PARTIAL, FULL}


def test_long_cross_only(sm90):
    """Many full tiles between others, several words of the map: 1100 keys are 18 tiles of 64."""
    ids = torch.arange(1100, device=sm90.device).div(200, rounding_mode="floor").remainder(2).to(torch.uint8)
    mask = AttentionMask.cross_only(cu_seqlens_of((1100,), sm90.device), ids)
    assert_right(sm90, make_inputs(1100, 1100, mask=mask, heads=1, dim=64, dtype=torch.bfloat16, device=sm90.device))


@pytest.mark.parametrize("pattern", (False, True))
def test_what_nobody_sees_is_not_fetched(sm90, pattern):
    if sm90.emulator is None:
        pytest.skip("copies are counted by the emulator")
    lengths = (128, 128, 128, 128)
    packed = AttentionMask.packed(cu_seqlens_of(lengths))
    if pattern:  # the same pairs, through spans only
        span = torch.arange(512).div(128, rounding_mode="floor").int()
        everywhere = torch.zeros(512, dtype=torch.int32), torch.full((512,), 512, dtype=torch.int32)
        packed = AttentionMask.from_rows(*everywhere, span_q=span, span_k=span)

    def loads(mask: AttentionMask | None) -> int:
        sm90.emulator.reset_counts()
        run(make_inputs(512, 512, mask=mask, heads=1, dim=64, dtype=torch.bfloat16), "native")
        return sm90.emulator.counts()["tma_loads"]

    # Per block of rows: 1 + 2 + 2 loads; per tile 2 in the forward, 2 in dQ, 4 (of 64 queries) in dK and dV.
    assert loads(None) == 4 * 5 + 16 * 8
    assert loads(packed) == 4 * 5 + 4 * 8


@pytest.mark.parametrize("pattern", (False, True))
def test_few_tokens(sm90, pattern):
    for tokens in ((0, 5), (5, 0), (1, 1), (1, 300), (300, 1)):
        span_q, span_k = (torch.zeros(n, dtype=torch.int32, device=sm90.device) for n in tokens)
        mask = AttentionMask.from_rows(torch.zeros_like(span_q), span_q + tokens[1], span_q=span_q, span_k=span_k)
        given = mask if pattern else None
        x = make_inputs(*tokens, dim=64, dtype=torch.bfloat16, mask=given, device=sm90.device)
        if 0 not in tokens:
            assert_right(sm90, x, with_lse=False, case=tokens)
            continue
        result = run(x, "native")
        assert (result.out == 0).all() and (result.lse == -torch.inf).all(), tokens
        for name in ("dq", "dk", "dv"):
            assert (getattr(result, name) == 0).all(), f"{tokens} {name}"


@pytest.mark.parametrize("mask", ("packed_causal", "noise"))
def test_strides_that_tma_can_follow(sm90, mask):
    x = inputs(mask, sm90.device, dtype=torch.bfloat16, dim=64)

    def together(t: Tensor) -> Tensor:
        return torch.stack([t, t, t], 1).unbind(1)[1]

    def heads_first(t: Tensor) -> Tensor:
        return t.transpose(0, 1).contiguous().transpose(0, 1)

    expected = run(x, "native")
    for laid_out in (together, heads_first):
        y = replace(x, **{name: laid_out(getattr(x, name)) for name in ("q", "k", "v", "grad_out")})
        for (name, a), (_, b) in zip(run(y, "native").items(), expected.items(), strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("layout", ("off by one", "expanded", "odd head dim"))
def test_what_tma_cannot_follow_runs_elsewhere(sm90, layout):
    x = inputs("packed_causal", sm90.device, dtype=torch.bfloat16, dim=20 if layout == "odd head dim" else 64)

    def laid_out(t: Tensor) -> Tensor:
        if layout == "off by one":
            return t.new_zeros(t.numel() + 1)[1:].view(t.shape).copy_(t)
        return t[:, :1].expand_as(t) if layout == "expanded" else t

    y = replace(x, **{name: laid_out(getattr(x, name)) for name in ("q", "k", "v", "grad_out")})
    assert_right(sm90, y, sm90=False)


def test_a_gradient_that_tma_cannot_follow(sm90):
    """The backward may use other kernels than the forward."""
    x = inputs("packed_causal", sm90.device, dtype=torch.bfloat16, dim=64)
    x = replace(x, grad_out=x.grad_out[:1, :1, :1].expand_as(x.grad_out))
    actual, expected, truth = run(x, "native"), plain(x), plain(x.to(torch.float64))
    for name in ("dq", "dk", "dv"):
        assert_as_accurate(name, *(getattr(result, name) for result in (actual, expected, truth)))


def test_float32_runs_elsewhere(sm90):
    x = inputs("packed_causal", sm90.device, dim=64)
    if sm90.emulator is not None:
        sm90.emulator.reset_counts()
    run(x, "native")
    assert sm90.emulator is None or sm90.emulator.counts()["warpgroup_products"] == 0


def test_a_pattern_wants_these_kernels(cuda):
    """The Python side names another backend; the launcher rejects what it does not support."""
    if cuda.emulator is None:
        pytest.skip("a device has the capability it has")
    x = inputs("noise", cuda.device, dtype=torch.bfloat16, dim=64)
    with pytest.raises(ValueError, match="only the sm_90 CUDA kernels support spans and classes"):
        run(x, "native")


def test_a_nan_is_not_hidden(sm90):
    x = inputs("packed", sm90.device, dtype=torch.bfloat16, dim=64)
    x.k[3, 0, 0] = torch.nan
    out = run(x, "native").out
    assert out[0].isnan().any() and not out[80:].isnan().any()  # segment 0 has NaN, the others do not


@pytest.mark.parametrize("dim", (64, 128))
@pytest.mark.parametrize("mask", ("cross", "noise"))
def test_the_same_bits_whatever_runs_first(sm90, mask, dim):
    x = inputs(mask, sm90.device, dtype=torch.bfloat16, heads=4, kv_heads=2, dim=dim)
    results = [run(x, "native", with_lse=True) for _ in sm90.schedules()]
    for other in results[1:]:
        for (name, a), (_, b) in zip(results[0].items(), other.items(), strict=True):
            assert torch.equal(a, b), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("dim", (64, 128))
@pytest.mark.parametrize("mask", ("dense", "packed_causal", "cross_only"))
def test_large(sm90, mask, dim, dtype):
    """Too slow for emulation: many blocks, long loops."""
    cu = cu_seqlens_of((700, 0, 1, 2299, 1096), "cuda")
    ids = torch.arange(4096, device="cuda").div(300, rounding_mode="floor").remainder(3).to(torch.uint8)
    masks = {"packed_causal": AttentionMask.packed(cu, causal=True), "cross_only": AttentionMask.cross_only(cu, ids)}
    x = make_inputs(4096, 4096, heads=8, kv_heads=2, dim=dim, dtype=dtype, mask=masks.get(mask), device="cuda")
    assert_right(sm90, x)
