"""Every backend judged against float64, relative to `F.scaled_dot_product_attention` in the same dtype."""

import isas
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmkernels.ops.attention import AttentionMask
from mmkernels.runtime.backends import candidates
from mmkernels.testing import assert_as_accurate
from mmkernels.testing.attention import (
    MASKS,
    AttentionInputs,
    Gradients,
    MaskCase,
    cancelling_terms,
    make_inputs,
    plain,
    run,
)
from mmkernels.testing.attention_common import FAMILIES, share
from mmkernels.testing.packing import cu_seqlens_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
every_backend = pytest.mark.parametrize("backend", ["native", "triton", "reference"])
every_mask = pytest.mark.parametrize("mask", MASKS)


def needs(backend: str, dtype: torch.dtype) -> None:
    reason = candidates("attention", torch.device("cpu"), dtype)[backend]
    if reason is not None:
        pytest.skip(reason)


def draws(backend: str, tokens: int = 239) -> int:
    """The largest error of few rows is noisy: judge several draws at once. The interpreter is slow."""
    return 1 if backend == "triton" and tokens > 200 else 3


def assert_right(inputs: list[AttentionInputs], backend: str, *, with_lse: bool = False) -> None:
    """Compare a backend with the truth over all draws at once."""

    def stacked(results: list[Gradients], name: str) -> Tensor:
        return torch.stack([getattr(result, name) for result in results])

    actual = [run(x, backend, with_lse=with_lse) for x in inputs]
    truth = [plain(x.to(torch.float64), with_lse=with_lse) for x in inputs]
    expected = [plain(x, with_lse=with_lse) for x in inputs]
    terms = [cancelling_terms(x, with_lse=with_lse) for x in inputs]
    for name, _ in actual[0].items():
        a, e, t = (stacked(results, name) for results in (actual, expected, truth))
        if t.dtype == inputs[0].q.dtype:
            torch.testing.assert_close(a, t, rtol=1e-11, atol=1e-12)
        elif t.abs().max() > 1e-12:
            cancels = name in terms[0] and (name != "dq" or backend == "triton")
            cancelling = torch.stack([one[name] for one in terms]) if cancels else None
            assert_as_accurate(name, a, e, t, terms=cancelling)
        else:
            # With one visible key, <grad_out, v> - <grad_out, out> cancels: up to the rounding of two sums in Triton,
            # which adds in another order, exactly elsewhere.
            x = inputs[0]
            floor = 1e-6 * x.grad_out.abs().max() * x.v.abs().max() if backend == "triton" else 0.0
            assert a.abs().max() <= floor, name


# What takes the same road through a kernel as another mask runs in one dtype where that is slow.
_INTERPRETED_ONCE = ("image_spans", "image_spans_window", "media_last", "media_own", "noise")


@every_backend
@every_dtype
@every_mask
def test_masks(mask, dtype, backend):
    needs(backend, dtype)
    if backend == "triton" and dtype != torch.float32 and mask in _INTERPRETED_ONCE:
        pytest.skip("in float32 only: the interpreter is slow")
    case = MASKS[mask]
    heads = {"heads": 4, "kv_heads": 2, "dim": 32}
    seeds = range(draws(backend, case.tokens[0]))
    assert_right([make_inputs(*case.tokens, **heads, dtype=dtype, mask=case.mask(), seed=s) for s in seeds], backend)


@every_backend
@every_dtype
@pytest.mark.parametrize("dims", [(64, 64), (72, 72), (80, 40), (128, 128), (16, 33), (256, 256)], ids=str)
def test_head_dims(dims, dtype, backend):
    if backend == "triton" and dtype == torch.float32 and max(dims) > 128:
        pytest.skip("float32 head dims up to 128 in Triton")
    needs(backend, dtype)
    case = MASKS["packed_causal"]
    tokens = case.tokens if backend != "triton" else (76, 76)
    mask = case.mask() if backend != "triton" else MASKS["packed"].build(cu_seqlens_of((5, 70, 1)), None)
    sizes = {"heads": 2, "kv_heads": 1, "dim": dims[0], "dim_v": dims[1], "dtype": dtype}
    seeds = range(1 if backend == "triton" else 12)  # few queries: the largest error of dv is noisy
    assert_right([make_inputs(*tokens, **sizes, mask=mask, seed=seed) for seed in seeds], backend)


@every_backend
@every_dtype
@pytest.mark.parametrize("mask", ["dense", "packed_causal", "cross", "tiny"])
def test_gradient_through_lse(mask, dtype, backend):
    needs(backend, dtype)
    case = MASKS[mask]
    sizes = {"heads": 3, "kv_heads": 3, "dim": 40, "dtype": dtype}
    inputs = [make_inputs(*case.tokens, **sizes, mask=case.mask(), seed=seed) for seed in range(draws(backend))]
    assert_right(inputs, backend, with_lse=True)


@every_backend
@every_dtype
@pytest.mark.parametrize("amplitude", [0.0, 10.0, 300.0])
def test_logits_from_flat_to_one_hot(amplitude, dtype, backend):
    needs(backend, dtype)
    case = MASKS["cross"]
    sizes = {"heads": 2, "dim": 48, "dtype": dtype, "amplitude": amplitude}
    assert_right(
        [make_inputs(*case.tokens, **sizes, mask=case.mask(), seed=seed) for seed in range(draws(backend))], backend
    )


OPTIONS = {
    "bias": ("image_spans", {"classes": (2, 2)}),
    "sink": ("image_spans", {"sink": True}),
    "dropout": ("image_spans", {"dropout_p": 0.3}),
    "all": ("image_spans", {"classes": (2, 2), "sink": True, "dropout_p": 0.1}),
    "all_and_pattern": ("cross_only", {"classes": (2, 2), "sink": True, "dropout_p": 0.1}),
}


@every_backend
@every_dtype
@pytest.mark.parametrize("option", OPTIONS)
def test_options(option, dtype, backend):
    needs(backend, dtype)
    if backend == "triton" and dtype != torch.float32 and option != "all_and_pattern":
        pytest.skip("in float32 only: the interpreter is slow")
    mask, options = OPTIONS[option]
    case = MASKS[mask]
    heads = (2, 1) if backend == "triton" else (4, 2)
    sizes = {"heads": heads[0], "kv_heads": heads[1], "dim": 40, "dtype": dtype, **options}
    count = 3 if option == "all_and_pattern" else draws(backend)
    inputs = [make_inputs(*case.tokens, **sizes, mask=case.mask(), seed=seed) for seed in range(count)]
    assert_right(inputs, backend, with_lse=option != "bias")


@every_backend
@pytest.mark.parametrize("scale", [-0.3, 0.0, 1.0, 5])
def test_scale(scale, backend):
    needs(backend, torch.float32)
    case = MASKS["packed"]
    assert_right([make_inputs(*case.tokens, dim=16, scale=scale, mask=case.mask())], backend)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("heads", [(6, 1), (1, 1), (8, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_sequences(heads, dtype, backend):
    """Several tiles and tasks in both directions; one head, so that backward takes two passes, and grouped heads."""
    needs(backend, dtype)
    mask = MASKS["packed"].build(cu_seqlens_of((500, 1, 299, 130)), cu_seqlens_of((413, 200, 0, 420)))
    sizes = {"heads": heads[0], "kv_heads": heads[1], "dim": 24, "dtype": dtype, "mask": mask}
    assert_right([make_inputs(930, 1033, **sizes, seed=seed) for seed in range(8)], backend)


# All keys of a query within one tile of the CPU's backward, and several tiles.
COMMON = {
    "dense": MaskCase((196,), build=lambda cu_q, cu_k: None),
    "causal": MaskCase((196,), options={"causal": True}),
    "long": MaskCase((700,), build=lambda cu_q, cu_k: None),
    "packed_causal": MaskCase((300, 280, 7, 1, 90), options={"causal": True}),
}

# dk of several tiles has the delta of a rounded out, as SDPA's has.
OF_COMMON = {"dense": ("dq", "dk"), "causal": ("dq", "dk"), "long": ("dq", "dk"), "packed_causal": ("dq",)}


def draw_common(family: str, mask: str, dtype: torch.dtype, seeds: int = 3, **options: object) -> list[AttentionInputs]:
    case, sizes = COMMON[mask], {"heads": 2, "dim": 64, "dtype": dtype, **options}
    return [share(make_inputs(*case.tokens, **sizes, mask=case.mask(), seed=s), family, s) for s in range(seeds)]


def assert_gradients(inputs: list[AttentionInputs], backend: str, names: tuple[str, ...]) -> None:
    """Gradients whose truth may be 0, without the room for cancelling terms."""
    results = [(run(x, backend), plain(x), plain(x.to(torch.float64))) for x in inputs]
    for name in names:
        assert_as_accurate(
            name, *(torch.stack([getattr(one, name) for one in these]) for these in zip(*results, strict=True))
        )


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", COMMON)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_with_much_in_common(family, mask, dtype, backend):
    needs(backend, dtype)
    if backend == "triton" and (mask != "dense" or dtype != torch.float32):
        pytest.skip("dense in float32 only: the interpreter is slow")
    seeds = 1 if backend == "triton" else 3
    assert_gradients(draw_common(family, mask, dtype, seeds), backend, OF_COMMON[mask])


@pytest.mark.parametrize("mask", ["dense", "causal"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_in_common_against_a_softmax_in_memory(family, mask):
    """SDPA's fused kernel takes delta from a rounded out; what has none cancels to a rounding of delta."""
    needs("native", torch.float32)
    with sdpa_kernel([SDPBackend.MATH]):
        assert_gradients(draw_common(family, mask, torch.float32), "native", ("dq", "dk"))


@pytest.mark.parametrize("mask", ["long", "packed_causal"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mean of values"])
def test_keys_in_common_in_several_tiles_against_a_softmax_in_memory(family, mask):
    needs("native", torch.float32)
    with sdpa_kernel([SDPBackend.MATH]):
        assert_gradients(draw_common(family, mask, torch.float32), "native", ("dq",))


@pytest.mark.parametrize("option", [{"sink": True}, {"dropout_p": 0.2}], ids=str)
@pytest.mark.parametrize("mask", ["dense", "causal", "packed_causal"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mean of values"])
def test_tokens_in_common_with_options(family, mask, option):
    needs("native", torch.float32)
    assert_gradients(draw_common(family, mask, torch.float32, **option), "native", OF_COMMON[mask])


def image_spans(lengths: tuple[int, ...], run_of: int) -> AttentionMask:
    """Text and images in turn."""
    part = torch.cat([torch.arange(n) // run_of for n in lengths])
    image = part % 2 == 1
    return AttentionMask.multimodal(cu_seqlens_of(lengths), image.byte(), torch.where(image, part, -1).int())


# How much larger the error of a bf16 gradient may be than that of a float32 one cast to bf16. Where more than three
# quarters of all pairs are computed the products with P and dS are in bf16: sqrt(2) times, more for a rounded delta.
GRADIENTS = {
    "packed": (lambda: AttentionMask.packed(cu_seqlens_of((256, 100, 1, 211))), 1.02),
    "causal": (lambda: AttentionMask.packed(cu_seqlens_of((568,)), causal=True), 1.02),
    "packed causal": (lambda: AttentionMask.packed(cu_seqlens_of((256, 100, 1, 211)), causal=True), 1.02),
    "image spans": (lambda: image_spans((256, 312), 64), 1.02),
    "dense": (lambda: None, 1.5),
}


@pytest.mark.parametrize("kind", GRADIENTS)
def test_bfloat16_gradients_like_float32_ones_that_were_cast(kind):
    needs("native", torch.bfloat16)
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


@isas.each
def test_each_instruction_set(isa):
    isas.run_on(isa, check_all_dtypes)


def check_all_dtypes() -> None:
    """Dense, ragged and tiny tiles in each dtype on the native backend."""
    for dtype in DTYPES:
        for name in ("dense", "packed_causal", "cross", "tiny"):
            case = MASKS[name]
            sizes = {"heads": 4, "kv_heads": 2, "dim": 40, "dtype": dtype}
            inputs = [make_inputs(*case.tokens, **sizes, mask=case.mask(), seed=seed) for seed in range(3)]
            assert_right(inputs, "native")
    for mask in ("dense", "packed_causal"):
        for family in FAMILIES:
            test_tokens_with_much_in_common(family, mask, torch.float32, "native")
            test_tokens_with_much_in_common(family, mask, torch.bfloat16, "native")
