"""A pair that the mask hides contributes nothing, whatever its values: a NaN reaches only rows that see it."""

from dataclasses import replace

import backends
import pytest
import torch
from torch import Tensor

from mmkernels.testing.attention import MASKS, AttentionInputs, Gradients, dense_mask, make_inputs, run

CASES = {
    "packed": ("packed", {}),
    "causal": ("packed_causal", {"kv_heads": 1}),
    "cross": ("cross", {"dim": 24, "dim_v": 40}),
    "window": ("window", {"scale": -0.3}),
    "tiny": ("tiny", {}),
    "image_spans": ("image_spans", {"classes": (2, 2), "sink": True}),
    "media_own": ("media_own", {}),
    "cross_only": ("cross_only", {"classes": (2, 2), "dropout_p": 0.2}),
    "noise": ("noise", {"sink": True}),
    "alibi": ("packed_causal", {"alibi": True, "softcap": 5.0}),
    "softcap": ("image_spans", {"softcap": 2.0}),
    "softcap_long": ("packed_causal", {"softcap": 2.0}),
}
# Without Triton: docs/numerics.md says how far a NaN can reach in a tile.
BACKENDS = [*(("native", dtype) for dtype in backends.DTYPES), ("reference", torch.float32)]


def poisoned(x: AttentionInputs, name: str, row: int, value: float) -> AttentionInputs:
    """Set one element of one row to another value."""
    tensor = getattr(x, name).clone()
    tensor[row, 0, -1] = value
    return replace(x, **{name: tensor})


def assert_unchanged(clean: Gradients, dirty: Gradients, queries: Tensor, keys: Tensor, case: str) -> None:
    """The same bits in the rows of these queries and keys."""
    assert torch.equal(clean.out[queries], dirty.out[queries]), f"{case}: out"
    assert torch.equal(clean.lse[:, queries], dirty.lse[:, queries]), f"{case}: lse"
    assert torch.equal(clean.dq[queries], dirty.dq[queries]), f"{case}: dq"
    assert torch.equal(clean.dk[keys], dirty.dk[keys]), f"{case}: dk"
    assert torch.equal(clean.dv[keys], dirty.dv[keys]), f"{case}: dv"


def inputs_of(case: str, dtype: torch.dtype) -> AttentionInputs:
    mask, options = CASES[case]
    sizes = {"heads": 2, "dim": 24, "dtype": dtype} | options
    return make_inputs(*MASKS[mask].tokens, mask=MASKS[mask].mask(), **sizes)


def some_rows(count: int) -> list[int]:
    return sorted({0, count - 1, *torch.randint(0, count, (4,)).tolist()})


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=str)
def test_nothing_goes_through_a_hidden_pair(backend, dtype):
    backends.need("attention", backend, dtype)
    for case in CASES:
        x = inputs_of(case, dtype)
        seen, clean = dense_mask(x), run(x, backend, with_lse=True)
        for name in ("q", "grad_out", "k", "v"):
            for value in (torch.nan, torch.inf):
                for row in some_rows(len(getattr(x, name))):
                    dirty = run(poisoned(x, name, row, value), backend, with_lse=True)
                    if name in ("k", "v"):
                        queries, reached = seen[:, row], dirty.out[seen[:, row]]
                    else:
                        queries = torch.zeros(len(seen), dtype=torch.bool)
                        queries[row] = seen[row].any()
                        reached = dirty.dv[seen[row]]
                    # An infinite logit may be -inf, and dropout may hide the pair.
                    if value != value and x.dropout_p == 0 and len(reached):
                        assert not reached.isfinite().flatten(1).all(1).any(), f"{case}: the poison has no effect"
                    assert_unchanged(clean, dirty, ~queries, ~seen[queries].any(0), f"{case}: {value} in {name}")


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_bias_of_hidden_classes(backend):
    """Queries of a class see only keys of the other, so the bias of equal classes is unused."""
    backends.need("attention", backend)
    mask = MASKS["cross_only"]
    x = make_inputs(*mask.tokens, classes=(2, 2), mask=mask.mask())
    bias = x.pair_bias.clone()
    bias[:, 0, 0] = bias[:, 1, 1] = torch.nan
    clean, dirty = run(x, backend), run(replace(x, pair_bias=bias), backend)
    everything = torch.ones(mask.tokens[0], dtype=torch.bool)
    assert_unchanged(clean, dirty, everything, everything, "bias")
    assert torch.equal(clean.dbias, dirty.dbias)
