"""attention_weights: what attention weighs the values with."""

import named
import pytest
import torch

from mmkernels import AttentionMask, attention, attention_weights
from mmkernels.testing.attention import MASKS, dense_mask, make_inputs

CASES = {
    "dense": {},
    "packed": {"softcap": 1.5, "alibi": True, "sink": True},
    "cross_causal": {"scale": -0.3, "alibi": True},
    "window_both": {},
    "image_spans": {"classes": (2, 2), "sink": True, "alibi": True},
    "cross_only": {"classes": (2, 2)},
    "padding": {"softcap": 2.0},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_weighs_as_attention_does(name, dtype):
    case = MASKS[name]
    x = make_inputs(*case.tokens, heads=4, kv_heads=2, dim=16, dtype=dtype, mask=case.mask(), **CASES[name])
    rows = torch.tensor([0, len(x.q) - 1, 0, len(x.q) // 2, len(x.q) // 3])
    names = ("scale", "softcap", "alibi_slopes", "pair_bias", "sink")
    options = {name: getattr(x, name) for name in names}
    p = attention_weights(x.q, x.k, x.mask, rows=rows, **options)
    assert p.shape == (4, 5, len(x.k))
    assert p.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not p[:, ~dense_mask(x)[rows]].any()
    out = torch.einsum("hrk,khd->rhd", p.double(), x.v.double().repeat_interleave(2, 1))
    expected = attention(x.q, x.k, x.v, x.mask, backend="reference", **options)[rows]
    torch.testing.assert_close(out.to(dtype), expected)


def test_batched():
    q, k, v = torch.randn(2, 5, 4, 8), torch.randn(2, 7, 2, 8), torch.randn(2, 7, 2, 8)
    rows, slopes = torch.tensor([4, 1]), torch.rand(4)
    for mask in (None, AttentionMask.from_padding(torch.ones(2, 5).bool(), torch.rand(2, 7) < 0.6, causal=True)):
        p = attention_weights(q, k, mask, rows=rows, alibi_slopes=slopes)
        assert p.shape == (2, 4, 2, 7)
        out = torch.einsum("bhrk,bkhd->brhd", p, v.repeat_interleave(2, 2))
        torch.testing.assert_close(out, attention(q, k, v, mask, alibi_slopes=slopes)[:, rows])


def test_a_query_that_sees_nothing_and_no_rows():
    cu = torch.tensor([0, 2, 3], dtype=torch.int32)
    mask = AttentionMask.packed(cu, torch.tensor([0, 0, 4], dtype=torch.int32))
    q, k = torch.randn(3, 2, 8, requires_grad=True), torch.randn(4, 2, 8)
    p = attention_weights(q, k, mask, rows=torch.tensor([0, 2], dtype=torch.int32), sink=torch.zeros(2))
    assert not p.requires_grad
    assert not p[:, 0].any()
    assert (p[:, 1].sum(-1) < 1).all()
    assert attention_weights(q, k, mask, rows=torch.zeros(0, dtype=torch.int64)).shape == (2, 0, 4)
    assert attention_weights(q[None][:0], k[None][:0], rows=torch.zeros(1).long()).shape == (0, 2, 1, 4)


def test_a_mistake_is_named():
    q, cu = torch.randn(3, 2, 8), torch.tensor([0, 3], dtype=torch.int32)
    one = torch.tensor([1])
    named.mistakes(
        (lambda: attention_weights(q, q, rows=torch.tensor([3])), ValueError, r"rows: expected queries in \[0, 3\)"),
        (lambda: attention_weights(q, q, rows=torch.tensor([-1])), ValueError, r"rows: expected queries in \[0, 3\)"),
        (lambda: attention_weights(q, q, rows=[1]), TypeError, r"rows: expected \[R\] int64"),
        (lambda: attention_weights(q, q, rows=torch.ones(1)), TypeError, r"rows: expected \[R\] int64"),
        (lambda: attention_weights(q, q[..., :7], rows=one), ValueError, "k: expected head dim D=8 like q"),
        (lambda: attention_weights(q, q, rows=one, softcap=0), ValueError, "softcap: expected a number"),
        (
            lambda: attention_weights(q, q, AttentionMask.packed(cu), rows=one, pair_bias=torch.zeros(2, 1, 1)),
            ValueError,
            "mask: expected classes",
        ),
    )
