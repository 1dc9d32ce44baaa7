"""The CUDA C++ attention kernels, emulated and on a device: accuracy against float64, every layout, the same bits."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mmkernels.ops.attention import AttentionMask
from mmkernels.testing import assert_as_accurate
from mmkernels.testing.attention import INTERVAL_MASKS, MASKS, AttentionInputs, make_inputs, plain, run

LOW = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *LOW)
# Padded to 64, 128 and 256; not multiples of a matrix instruction's 16, of a vector, of two; Dv smaller and larger.
DIMS = ((8, 8), (64, 64), (72, 72), (80, 80), (96, 96), (128, 128), (20, 37), (64, 160), (176, 40), (256, 256))


def inputs(mask: str, device: str, **options: object) -> AttentionInputs:
    case = MASKS[mask]
    return make_inputs(*case.tokens, mask=case.mask(device), device=device, **options)


def assert_right(x: AttentionInputs, *, with_lse: bool = False, case: object = "") -> None:
    """A failure names the `case`."""
    actual = dict(run(x, "native", with_lse=with_lse).items())
    truth = dict(plain(x.to(torch.float64), with_lse=with_lse).items())
    for name, expected in plain(x, with_lse=with_lse).items():
        assert actual[name].shape == truth[name].shape, f"{case} {name}"
        if truth[name].count_nonzero() > 0:
            assert_as_accurate(f"{case} {name}", actual[name], expected, truth[name])
        else:
            # One visible key: <grad_out, v> - delta is zero up to the rounding of two float32 sums in different orders.
            assert name in ("dq", "dk"), f"{case} {name}"
            assert actual[name].abs().max() <= 1e-6 * x.grad_out.abs().max() * x.v.abs().max(), f"{case} {name}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks(cuda, dtype):
    for mask in INTERVAL_MASKS:
        # With one score per head a gradient of lse is one rounding of ds to 16 bits: no statistics to compare.
        with_lse = mask != "single" or dtype not in LOW
        assert_right(inputs(mask, cuda.device, dtype=dtype, dim=64), with_lse=with_lse, case=mask)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_head_dims(cuda, dtype):
    mask = AttentionMask.packed(torch.tensor([0, 30, 75], dtype=torch.int32, device=cuda.device))
    for dims in DIMS:
        x = make_inputs(75, 75, dim=dims[0], dim_v=dims[1], dtype=dtype, mask=mask, device=cuda.device)
        assert_right(x, case=dims)


def test_tiny_head_dim(cuda):
    # In float32: for so few products plain PyTorch on the CPU uses no 16-bit matrix products.
    assert_right(inputs("packed", cuda.device, dim=1, dim_v=3), with_lse=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grouped_heads(cuda, dtype):
    for heads, kv_heads in ((4, 2), (6, 1)):
        x = inputs("packed_causal", cuda.device, dtype=dtype, heads=heads, kv_heads=kv_heads, dim=32)
        assert_right(x, with_lse=True, case=(heads, kv_heads))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_from_flat_to_one_hot(cuda, dtype):
    for amplitude in (0.0, 10.0, 300.0):
        assert_right(inputs("cross", cuda.device, dtype=dtype, amplitude=amplitude, dim=48), case=amplitude)


def test_scale(cuda):
    for scale in (-0.3, 0.0, 1.0):
        assert_right(inputs("packed", cuda.device, scale=scale, dim=16), case=scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softcap(cuda, dtype):
    """Caps that bend some products, most of them (not all: the error of one straight pair would decide alone), and
    none."""
    bent = {"softcap": 1.5}, {"softcap": 20.0, "amplitude": 10.0, "scale": -0.3}, {"softcap": 1e4}
    for mask, dim, options in zip(("packed_causal", "cross", "window"), (64, 96, 256), bent, strict=True):
        x = inputs(mask, cuda.device, dtype=dtype, heads=4, kv_heads=2, dim=dim, **options)
        assert_right(x, with_lse=True, case=(mask, options))


def test_softcap_where_every_pair_is_bent(cuda):
    """There 1 - tanh^2 would round to 0, and plain PyTorch's float32 gradient is noise."""
    x = inputs("cross", cuda.device, amplitude=0.0, dim=16, softcap=2.0)
    x = replace(x, q=x.q + 2.5, k=x.k + 2.0 + 0.1 * x.v.mean(2, keepdim=True))  # tanh of about 10
    result, truth = run(x, "native"), plain(x.to(torch.float64))
    for name in ("dq", "dk"):
        ours, exact = getattr(result, name), getattr(truth, name)
        assert exact.abs().max() > 0
        assert (ours - exact).abs().max() < 1e-3 * exact.abs().max(), name


@pytest.mark.parametrize("layout", ("packed_qkv", "heads_first", "off_by_one", "expanded"))
def test_layouts(cuda, layout):
    """Strides that a kernel must follow, and addresses at which it may not use 16-byte accesses."""

    def laid_out(t: Tensor) -> Tensor:
        if layout == "packed_qkv":
            return torch.stack([t, t, t], 1).unbind(1)[1]
        if layout == "heads_first":
            return t.transpose(0, 1).contiguous().transpose(0, 1)
        if layout == "off_by_one":
            storage = t.new_zeros(t.numel() + 1)
            return storage[1:].view(t.shape).copy_(t)
        return t[:, :1].expand_as(t)

    for dtype in DTYPES:
        x = inputs("packed_causal", cuda.device, dtype=dtype, dim=40)
        y = replace(x, **{name: laid_out(getattr(x, name)) for name in ("q", "k", "v", "grad_out")})
        expected = replace(x, **{name: getattr(y, name).contiguous() for name in ("q", "k", "v", "grad_out")})
        for (name, a), (_, b) in zip(run(y, "native").items(), run(expected, "native").items(), strict=True):
            assert torch.equal(a, b), f"{dtype} {name}"
        assert_right(y, case=dtype)


def test_few_tokens(cuda):
    for tokens in ((0, 5), (5, 0), (0, 0), (1, 1), (1, 300), (300, 1)):
        x = make_inputs(*tokens, dim=24, dtype=torch.bfloat16, device=cuda.device)
        if 0 not in tokens:
            assert_right(x, case=tokens)
            continue
        result = run(x, "native")
        assert (result.out == 0).all() and (result.lse == -torch.inf).all(), tokens
        for name in ("dq", "dk", "dv"):
            assert (getattr(result, name) == 0).all(), f"{tokens} {name}"


def test_rows_that_see_nothing(cuda):
    generator = torch.Generator().manual_seed(1)
    lo = torch.randint(0, 90, (130,), generator=generator)
    hi = (lo + torch.randint(-40, 40, (130,), generator=generator)).clamp(
        min=lo, max=torch.tensor(110)
    )  # half are empty
    mask = AttentionMask.from_rows(lo.int().to(cuda.device), hi.int().to(cuda.device))
    x = make_inputs(130, 110, dim=64, dtype=torch.bfloat16, mask=mask, device=cuda.device)
    assert_right(x, with_lse=True)
    blind = (hi == lo).to(cuda.device)
    result = run(x, "native")
    assert blind.any() and (result.out[blind] == 0).all() and (result.dq[blind] == 0).all()
    assert (result.lse[:, blind] == -torch.inf).all()


def test_a_nan_is_not_hidden(cuda):
    x = inputs("packed", cuda.device, dtype=torch.bfloat16)
    x.k[3, 0, 0] = torch.nan
    out = run(x, "native").out
    assert out[0].isnan().any() and not out[80:].isnan().any()  # segment 0 has NaN, the others do not


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_the_same_bits_whatever_runs_first(cuda, dtype):
    x = inputs("cross", cuda.device, dtype=dtype, heads=4, kv_heads=2, dim=64)
    results = [run(x, "native", with_lse=True) for _ in cuda.schedules()]
    for other in results[1:]:
        for (name, a), (_, b) in zip(results[0].items(), other.items(), strict=True):
            assert torch.equal(a, b), name


def test_16_bit_runs_on_matrix_instructions(cuda):
    if cuda.emulator is None:
        pytest.skip("counted by the emulator; on a device tests/aot looks for them in the machine code")
    cuda.emulator.reset_counts()
    run(inputs("packed", cuda.device, dtype=torch.bfloat16), "native")
    assert cuda.emulator.counts()["matrix_products"] > 0 and cuda.emulator.counts()["async_copies"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ("native", "triton"))
def test_large(backend, dtype):
    """Too slow for emulation: many blocks, long loops."""
    cu = torch.tensor([0, 700, 701, 3000, 4096], dtype=torch.int32, device="cuda")
    mask = AttentionMask.packed(cu, causal=True)
    x = make_inputs(4096, 4096, heads=8, kv_heads=2, dim=128, dtype=dtype, mask=mask, device="cuda")
    actual, expected, truth = run(x, backend), plain(x), plain(x.to(torch.float64))
    for (name, a), (_, b), (_, c) in zip(actual.items(), expected.items(), truth.items(), strict=True):
        assert_as_accurate(name, a, b, c)
