"""Gradients of tokens with a large common part, where terms cancel: judged against float64 without an allowance for
them."""

import backends
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmkernels.testing import assert_as_accurate
from mmkernels.testing.attention import AttentionInputs, MaskCase, make_inputs, plain, run
from mmkernels.testing.attention_common import FAMILIES, share

# All keys of a query within one tile of the CPU's backward, and several tiles.
COMMON = {
    "dense": MaskCase((196,), build=lambda cu_q, cu_k: None),
    "causal": MaskCase((196,), options={"causal": True}),
    "long": MaskCase((700,), build=lambda cu_q, cu_k: None),
    "packed_causal": MaskCase((300, 280, 7, 1, 90), options={"causal": True}),
}

# dk of several tiles uses delta from a rounded out, as SDPA does.
OF_COMMON = {"dense": ("dq", "dk"), "causal": ("dq", "dk"), "long": ("dq", "dk"), "packed_causal": ("dq",)}


def draw_common(family: str, mask: str, dtype: torch.dtype, seeds: int = 3, **options: object) -> list[AttentionInputs]:
    case, sizes = COMMON[mask], {"heads": 2, "dim": 64, "dtype": dtype, **options}
    return [share(make_inputs(*case.tokens, **sizes, mask=case.mask(), seed=s), family, s) for s in range(seeds)]


def assert_gradients(inputs: list[AttentionInputs], backend: str, names: tuple[str, ...], case: str) -> None:
    """Gradients whose truth may be 0, without an allowance for cancelling terms."""
    results = [(run(x, backend), plain(x), plain(x.to(torch.float64))) for x in inputs]
    for name in names:
        three = (torch.stack([getattr(one, name) for one in these]) for these in zip(*results, strict=True))
        assert_as_accurate(f"{case} {name}", *three)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", COMMON)
def test_tokens_with_much_in_common(mask, dtype):
    backends.need("attention", "native", dtype)
    for family in FAMILIES:
        assert_gradients(draw_common(family, mask, dtype), "native", OF_COMMON[mask], family)


@pytest.mark.parametrize("family", ["mean of all", "near keys and values", "one token"])
def test_tokens_with_much_in_common_in_triton(family):
    backends.need("attention", "triton")
    assert_gradients(draw_common(family, "dense", torch.float32, 1), "triton", OF_COMMON["dense"], family)


@pytest.mark.parametrize("mask", COMMON)
def test_tokens_in_common_against_a_softmax_in_memory(mask):
    """SDPA's fused kernel takes delta from a rounded out: gradients that cancel keep delta's rounding error."""
    backends.need("attention", "native")
    one_tile = mask in ("dense", "causal")
    for family in FAMILIES:
        if one_tile or family != "mean of values":
            with sdpa_kernel([SDPBackend.MATH]):
                names = ("dq", "dk") if one_tile else ("dq",)
                assert_gradients(draw_common(family, mask, torch.float32), "native", names, family)


@pytest.mark.parametrize(
    "option", [{"sink": True}, {"dropout_p": 0.2}, {"softcap": 2.0, "sink": True}, {"alibi": True}], ids=str
)
@pytest.mark.parametrize("mask", ["dense", "causal", "packed_causal"])
def test_tokens_in_common_with_options(mask, option):
    backends.need("attention", "native")
    for family in FAMILIES:
        if family != "mean of values":
            inputs = draw_common(family, mask, torch.float32, **option)
            assert_gradients(inputs, "native", OF_COMMON[mask], family)
