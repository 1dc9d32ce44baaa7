"""Every backend judged against float64, relative to `F.scaled_dot_product_attention` in the same dtype."""

import itertools
from dataclasses import replace

import backends
import pairwise
import pytest
import torch
from backends import DTYPES
from torch import Tensor

from mmkernels.ops.attention import AttentionMask
from mmkernels.testing import assert_as_accurate
from mmkernels.testing.attention import (
    MASKS,
    AttentionInputs,
    Gradients,
    MaskCase,
    cancelling_terms,
    capped,
    dense_mask,
    distances,
    make_inputs,
    plain,
    run,
)
from mmkernels.testing.packing import cu_seqlens_of

SINGLE, LOW = (torch.float32,), (torch.bfloat16, torch.float16)
compiled = pytest.mark.parametrize("backend", ["native", "reference"])  # fast: each test loops over all its cases


def draws(backend: str, tokens: int = 239, device: str = "cpu") -> int:
    """The worst errors of few rows are noisy: judge several draws together. The interpreter is slow."""
    return 1 if backends.interpreted(backend, device) and tokens > 200 else 3


def product_terms(x: AttentionInputs, with_lse: bool) -> dict[str, Tensor]:
    """Sums of absolute terms, in float64. With three tf32 products each term errs by a float32 rounding, and so does a
    score, which becomes the relative error of p. For all results but the bias's and the sink's."""
    x = x.to(torch.float64)
    q, grad_out, group = x.q, x.grad_out.abs(), x.q.shape[1] // x.k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (x.k, x.v))
    scale = x.q.shape[-1] ** -0.5 if x.scale is None else x.scale
    scores, of_scores = (torch.einsum("qhd,khd->hqk", *both) for both in ((q, k), (q.abs(), k.abs())))
    scores, of_scores = capped(scores * scale, x.softcap), of_scores * abs(scale)
    if x.pair_bias is not None:
        class_q, class_k = (ids.long() for ids in x.mask.classes)
        scores = scores + x.pair_bias[:, class_q[:, None], class_k]
    if x.alibi_slopes is not None:
        scores = scores - x.alibi_slopes[:, None, None] * distances(x)
    lse = plain(x).lse.clamp(min=torch.finfo(torch.float64).min)
    p = torch.where(dense_mask(x), (scores - lse[..., None]).exp(), 0.0)
    dp = torch.einsum("qhd,khd->hqk", grad_out, v.abs()) / (1 - x.dropout_p)
    ds = p * (1 + of_scores) * (dp + (p * dp).sum(-1, keepdim=True) + with_lse * x.grad_lse.abs()[..., None])
    p_dropped = p * (1 + of_scores) / (1 - x.dropout_p)

    def per_key(of_pairs: Tensor, rows: Tensor) -> Tensor:
        return torch.einsum("hqk,qhd->khd", of_pairs, rows).unflatten(1, (-1, group)).sum(2)

    return {
        "out": torch.einsum("hqk,khd->qhd", p_dropped, v.abs()),
        "lse": torch.where(p.sum(-1) > 0, lse.abs() + (p * of_scores).sum(-1), 0.0),
        "dq": torch.einsum("hqk,khd->qhd", ds, k.abs()) * abs(scale),
        "dk": per_key(ds, q.abs()) * abs(scale),
        "dv": per_key(p_dropped, grad_out),
    }


def assert_right(
    inputs: list[AttentionInputs], backend: str, *, with_lse: bool = False, case: object = "", device: str = "cpu"
) -> None:
    """Compare a backend with the truth over all draws together; a failure names the `case`.

    On another `device` the comparison is still with plain PyTorch on the CPU, with one bound for both.
    """

    def stacked(results: list[Gradients], name: str) -> Tensor:
        return torch.stack([getattr(result, name).cpu() for result in results])

    actual = [run(x.on(device), backend, with_lse=with_lse) for x in inputs]
    inputs = [x.on(device) if x.dropout_p > 0 else x for x in inputs]  # a device has its own random numbers
    truth = [plain(x.to(torch.float64), with_lse=with_lse) for x in inputs]
    expected = [plain(x, with_lse=with_lse) for x in inputs]
    terms = [cancelling_terms(x, with_lse=with_lse) for x in inputs]
    if not backends.interpreted(backend, device) and backend == "triton" and inputs[0].q.dtype == torch.float32:
        terms = [of_x | product_terms(x, with_lse) for x, of_x in zip(inputs, terms, strict=True)]
    for name, _ in actual[0].items():
        a, e, t = (stacked(results, name) for results in (actual, expected, truth))
        if t.dtype == inputs[0].q.dtype:
            torch.testing.assert_close(a, t, rtol=1e-11, atol=1e-12, msg=lambda m, name=name: f"{case} {name}: {m}")
        elif t.abs().max() > 1e-12:
            cancels = name in terms[0] and (name != "dq" or backend == "triton")
            cancelling = torch.stack([one[name].cpu() for one in terms]) if cancels else None
            assert_as_accurate(f"{case} {name}", a, e, t, terms=cancelling)
        else:
            # With one visible key, <grad_out, v> - <grad_out, out> cancels: in Triton up to the rounding of two sums,
            # because it adds in another order; exactly elsewhere.
            x = inputs[0]
            floor = 1e-6 * x.grad_out.abs().max() * x.v.abs().max() if backend == "triton" else 0.0
            assert a.abs().max() <= floor, f"{case} {name}"


def times(case: MaskCase, factor: int) -> MaskCase:
    """Longer segments."""
    longer = (tuple(n * factor for n in lengths) for lengths in (case.lengths_q, case.lengths_k))
    return replace(case, **dict(zip(("lengths_q", "lengths_k"), longer, strict=True)))


def assert_mask(
    mask: str, dtype: torch.dtype, backend: str, with_lse: bool, *, device: str = "cpu", factor: int = 1
) -> None:
    case = times(MASKS[mask], 1 if mask == "single" else factor)
    sizes = {"heads": 4, "kv_heads": 2, "dim": 40, "dtype": dtype}
    seeds = range(draws(backend, case.tokens[0], device))
    inputs = [make_inputs(*case.tokens, **sizes, mask=case.mask(), seed=seed) for seed in seeds]
    # With one score per head a 16-bit gradient of lse is one rounding of ds: no statistics to compare.
    assert_right(inputs, backend, with_lse=with_lse and mask != "single", case=mask, device=device)


@compiled
@backends.every_dtype
@pytest.mark.parametrize("with_lse", [False, True])
def test_masks(with_lse, dtype, backend):
    """Each mask, in half of the dtypes with a gradient through lse, in the other half without it."""
    backends.need("attention", backend, dtype)
    for i, mask in enumerate(MASKS):
        if (i + DTYPES.index(dtype)) % 2 == with_lse:
            assert_mask(mask, dtype, backend, with_lse)


# Other masks take the same kernel paths as one of these; in the slow interpreter, in float32 only.
INTERPRETED_IN_16_BITS = ("packed_causal", "tiny", "cross_only")


@pairwise.cases(
    mask=MASKS,
    dtype=SINGLE + LOW,
    only=lambda mask, dtype: dtype in SINGLE or mask in INTERPRETED_IN_16_BITS,
)
def test_masks_in_triton(mask, dtype):
    backends.need("attention", "triton", dtype)
    with_lse = list(MASKS).index(mask) % 2 == (dtype in SINGLE)
    assert_mask(mask, dtype, "triton", with_lse)


DIMS = ((64, 64), (72, 72), (80, 40), (128, 128), (16, 33), (256, 256))


@compiled
@backends.every_dtype
def test_head_dims(dtype, backend):
    backends.need("attention", backend, dtype)
    case = MASKS["packed_causal"]
    for dim, dim_v in DIMS:
        sizes = {"heads": 2, "kv_heads": 1, "dim": dim, "dim_v": dim_v, "dtype": dtype, "mask": case.mask()}
        inputs = [make_inputs(*case.tokens, **sizes, seed=seed) for seed in range(draws(backend))]
        assert_right(inputs, backend, case=(dim, dim_v))


def in_triton(dims: tuple[int, int], dtype: torch.dtype) -> bool:
    """Triton's limits; in the slow interpreter two dims in float16, which a kernel treats like bfloat16."""
    return dtype == torch.bfloat16 or (max(dims) <= 128 if dtype in SINGLE else dims in ((80, 40), (256, 256)))


@pairwise.cases(dims=DIMS, dtype=SINGLE + LOW, only=in_triton)
def test_head_dims_in_triton(dims, dtype):
    backends.need("attention", "triton", dtype)
    mask = AttentionMask.packed(cu_seqlens_of((5, 70, 1)))
    sizes = {"heads": 2, "kv_heads": 1, "dim": dims[0], "dim_v": dims[1], "dtype": dtype}
    assert_right([make_inputs(76, 76, **sizes, mask=mask)], "triton")


# Amplitudes of q, and scales.
LOGITS = ((0.0, None), (10.0, None), (10.0, -0.3), (300.0, None))


@backends.every
@backends.every_dtype
def test_logits_from_flat_to_one_hot(dtype, backend):
    backends.need("attention", backend, dtype)
    case = MASKS["cross"]
    for amplitude, scale in LOGITS if backend != "triton" or dtype in SINGLE else LOGITS[-1:]:
        sizes = {"heads": 2, "dim": 48, "dtype": dtype, "amplitude": amplitude, "scale": scale, "mask": case.mask()}
        inputs = [make_inputs(*case.tokens, **sizes, seed=seed) for seed in range(draws(backend))]
        assert_right(inputs, backend, case=(amplitude, scale))


@backends.every
def test_scale(backend):
    backends.need("attention", backend)
    case = MASKS["packed"]
    for scale in (-0.3, 0.0, 1.0, 5):
        assert_right([make_inputs(*case.tokens, dim=16, scale=scale, mask=case.mask())], backend, case=scale)


_EVERYTHING = {"softcap": 2.0, "alibi": True, "classes": (2, 2), "sink": True, "dropout_p": 0.1}
OPTIONS = {
    "bias": ("image_spans", {"classes": (2, 2)}),
    "sink": ("image_spans", {"sink": True}),
    "dropout": ("image_spans", {"dropout_p": 0.3}),
    "all": ("image_spans", {"classes": (2, 2), "sink": True, "dropout_p": 0.1}),
    "alibi": ("packed_causal", {"alibi": True}),
    "alibi_long": ("window_both", {"alibi": True, "softcap": 3.0, "sink": True}),
    "softcap": ("packed_causal", {"softcap": 1.5}),
    "softcap_far": ("cross", {"softcap": 20.0, "amplitude": 40.0, "scale": -0.3}),
    "softcap_and_all": (
        "image_spans",
        {"softcap": 2.0, "alibi": True, "classes": (2, 2), "sink": True, "dropout_p": 0.1},
    ),
    "all_and_pattern": ("cross_only", {"classes": (2, 2), "sink": True, "dropout_p": 0.1}),
}


def assert_option(
    option: str, dtype: torch.dtype, backend: str, heads: tuple[int, int], *, device: str = "cpu", factor: int = 1
) -> None:
    mask, options = OPTIONS[option]
    case = times(MASKS[mask], factor)
    sizes = {"heads": heads[0], "kv_heads": heads[1], "dim": 40, "dtype": dtype, **options}
    count = 3 if option.endswith("_pattern") or option == "softcap_and_all" else draws(backend, device=device)
    inputs = [make_inputs(*case.tokens, **sizes, mask=case.mask(), seed=seed) for seed in range(count)]
    assert_right(inputs, backend, with_lse=option != "bias", case=option, device=device)


@compiled
@backends.every_dtype
def test_options(dtype, backend):
    backends.need("attention", backend, dtype)
    for option in OPTIONS:
        assert_option(option, dtype, backend, (4, 2))


options_in_triton = pytest.mark.parametrize(
    ("option", "dtype"),
    [
        ("bias", torch.float32),
        ("sink", torch.bfloat16),
        ("dropout", torch.float16),
        ("all", torch.float32),
        ("all_and_pattern", torch.bfloat16),
        ("softcap", torch.float32),
        ("alibi", torch.bfloat16),
        ("alibi_long", torch.float32),
        ("softcap_far", torch.bfloat16),
        ("softcap_and_all", torch.float16),
    ],
    ids=str,
)


@options_in_triton
def test_options_in_triton(option, dtype):
    backends.need("attention", "triton", dtype)
    assert_option(option, dtype, "triton", (2, 1))


# In float32 beyond 64, the kernel of dq runs twice if there is a bias as well as distances: once for the sums of each.
BOTH_SUMS = {
    (96, 96): {},
    (40, 96): {"softcap": 2.0},
    (96, 40): {"softcap": 2.0, "sink": True, "dropout_p": 0.1, "scale": -0.2},
    (128, 128): {"softcap": 20.0, "amplitude": 20.0},
}
both_sums = pytest.mark.parametrize("dims", BOTH_SUMS, ids=str)


def assert_both_sums(dims: tuple[int, int], lengths: tuple[int, ...], *, device: str = "cpu") -> None:
    mask = MASKS["image_spans"].build(*[cu_seqlens_of(lengths)] * 2)
    sizes = {"heads": 2, "kv_heads": 1, "dim": dims[0], "dim_v": dims[1], "classes": (2, 2), "alibi": True}
    sizes |= {"mask": mask, **BOTH_SUMS[dims]}
    inputs = [make_inputs(sum(lengths), sum(lengths), **sizes, seed=seed) for seed in range(3)]
    assert_right(inputs, "triton", with_lse=dims[0] == 96, device=device)


@both_sums
def test_sums_by_class_and_by_distance_in_triton(dims):
    backends.need("attention", "triton")
    assert_both_sums(dims, (5, 70, 1))


ON_A_DEVICE = 4  # how much longer the segments are
on_a_device = pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)])


@on_a_device
@pytest.mark.parametrize("dtype", SINGLE + LOW, ids=str)
@pytest.mark.parametrize("with_lse", [False, True])
def test_masks_on_a_device(with_lse, dtype, device):
    backends.need("attention", "triton", dtype, device)
    for mask in MASKS:
        assert_mask(mask, dtype, "triton", with_lse, device=device, factor=ON_A_DEVICE)


@on_a_device
@pytest.mark.parametrize("dtype", SINGLE + LOW, ids=str)
def test_head_dims_on_a_device(dtype, device):
    backends.need("attention", "triton", dtype, device)
    case = times(MASKS["packed_causal"], ON_A_DEVICE)
    for dim, dim_v in DIMS:
        if dtype not in SINGLE or max(dim, dim_v) <= 128:
            sizes = {"heads": 2, "kv_heads": 1, "dim": dim, "dim_v": dim_v, "dtype": dtype, "mask": case.mask()}
            inputs = [make_inputs(*case.tokens, **sizes, seed=seed) for seed in range(3)]
            assert_right(inputs, "triton", case=(dim, dim_v), device=device)


@on_a_device
@options_in_triton
def test_options_on_a_device(option, dtype, device):
    backends.need("attention", "triton", dtype, device)
    assert_option(option, dtype, "triton", (2, 1), device=device)


@on_a_device
@both_sums
def test_sums_by_class_and_by_distance_on_a_device(dims, device):
    backends.need("attention", "triton", device=device)
    assert_both_sums(dims, (20, 280, 4), device=device)


@on_a_device
@pytest.mark.parametrize("dtype", SINGLE + LOW, ids=str)
def test_logits_on_a_device(dtype, device):
    backends.need("attention", "triton", dtype, device)
    case = times(MASKS["cross"], ON_A_DEVICE)
    for amplitude, scale in LOGITS if dtype in SINGLE else LOGITS[-1:]:
        sizes = {"heads": 2, "dim": 48, "dtype": dtype, "amplitude": amplitude, "scale": scale, "mask": case.mask()}
        inputs = [make_inputs(*case.tokens, **sizes, seed=seed) for seed in range(3)]
        assert_right(inputs, "triton", case=(amplitude, scale), device=device)


@pytest.mark.parametrize(
    ("backend", "heads", "dtype"),
    [
        *itertools.product(["native"], [(6, 1), (1, 1), (8, 8)], [torch.float32, torch.bfloat16]),
        ("reference", (6, 1), torch.float32),
        ("reference", (1, 1), torch.bfloat16),
    ],
    ids=str,
)
def test_long_sequences(backend, heads, dtype):
    """Several tiles and tasks in both directions; one head, so that backward takes two passes, and grouped heads."""
    backends.need("attention", backend, dtype)
    mask = MASKS["packed"].build(cu_seqlens_of((500, 1, 299, 130)), cu_seqlens_of((413, 200, 0, 420)))
    sizes = {"heads": heads[0], "kv_heads": heads[1], "dim": 24, "dtype": dtype, "mask": mask}
    assert_right([make_inputs(930, 1033, **sizes, seed=seed) for seed in range(draws(backend))], backend)


def image_spans(lengths: tuple[int, ...], run_of: int) -> AttentionMask:
    """Alternating text and images."""
    part = torch.cat([torch.arange(n) // run_of for n in lengths])
    image = part % 2 == 1
    return AttentionMask.multimodal(cu_seqlens_of(lengths), image.byte(), torch.where(image, part, -1).int())


# How much larger the error of a bf16 gradient may be than that of a float32 gradient cast to bf16. Where more than
# three quarters of all pairs are computed, the products with P and dS are in bf16: sqrt(2) times, more for a rounded
# delta.
GRADIENTS = {
    "packed": (lambda: AttentionMask.packed(cu_seqlens_of((256, 100, 1, 211))), 1.02),
    "causal": (lambda: AttentionMask.packed(cu_seqlens_of((568,)), causal=True), 1.02),
    "packed causal": (lambda: AttentionMask.packed(cu_seqlens_of((256, 100, 1, 211)), causal=True), 1.02),
    "image spans": (lambda: image_spans((256, 312), 64), 1.02),
    "dense": (lambda: None, 1.5),
}


@pytest.mark.parametrize("kind", GRADIENTS)
def test_bfloat16_gradients_like_float32_ones_that_were_cast(kind):
    backends.need("attention", "native", torch.bfloat16)
    build, factor = GRADIENTS[kind]
    mask = build()
    sizes = {"heads": 4, "kv_heads": 2, "dim": 64, "dtype": torch.bfloat16, "mask": mask}
    inputs = [make_inputs(568, 568, **sizes, seed=seed) for seed in range(4)]
    results = [(run(x, "native"), plain(x.to(torch.float32)), plain(x.to(torch.float64))) for x in inputs]
    for name in ("dq", "dk", "dv"):
        ours, single, truth = (
            torch.stack([getattr(one, name) for one in these]) for these in zip(*results, strict=True)
        )
        error, least = ((x.bfloat16().double() - truth).square().mean().sqrt() for x in (ours, single))
        assert error <= factor * least, f"{name}: {error / least:.3f}"


def check_native() -> None:
    """Dense, ragged and tiny tiles in each dtype on the native backend; for one process of each instruction set."""
    import test_tokens_in_common

    for dtype in DTYPES:
        for mask in ("dense", "packed_causal", "cross", "tiny"):
            assert_mask(mask, dtype, "native", with_lse=False)
    for mask, dtype in (("dense", torch.bfloat16), ("packed_causal", torch.float32)):
        test_tokens_in_common.test_tokens_with_much_in_common(mask, dtype)
