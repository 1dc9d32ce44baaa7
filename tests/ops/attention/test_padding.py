"""Masks of padded batches: the dense definition, transformers' masks, and both ways of laying them out."""

import backends
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import check

from mmkernels import AttentionMask, attention
from mmkernels.ops.attention import builders
from mmkernels.ops.attention.rows import padding_rows

backend = backends.fixture("attention")
side = st.none() | st.integers(0, 9)
pair_of_sides = st.none() | st.tuples(side, side)


def dense(real_q, real_k, causal, window):
    """The definition, pair by pair, over the flattened batch."""
    (batch, tokens_q), tokens_k = real_q.shape, real_k.shape[1]
    left, right = window if window is not None else (None, None)
    right = 0 if causal else right
    mask = torch.zeros(batch, tokens_q, batch, tokens_k, dtype=torch.bool)
    for b in range(batch):
        for p in range(tokens_q):
            at = p + tokens_k - tokens_q
            for j in range(tokens_k):
                near = (left is None or j >= at - left) and (right is None or j <= at + right)
                mask[b, p, b, j] = near and bool(real_q[b, p]) and bool(real_k[b, j])
    return mask.view(batch * tokens_q, batch * tokens_k)


def bools(draw, batch, tokens, adjacent):
    if not adjacent:
        rows = draw(st.lists(st.lists(st.booleans(), min_size=tokens, max_size=tokens), min_size=batch, max_size=batch))
        return torch.tensor(rows, dtype=torch.bool).view(batch, tokens)
    mask = torch.zeros(batch, tokens, dtype=torch.bool)
    for b in range(batch):
        begin, end = sorted(draw(st.tuples(st.integers(0, tokens), st.integers(0, tokens))))
        mask[b, begin:end] = True
    return mask


@settings(max_examples=300, deadline=None)
@given(st.data(), st.integers(0, 3), st.integers(0, 6), st.integers(0, 6), st.booleans(), st.booleans(), pair_of_sides)
def test_definition(data, batch, tokens_q, tokens_k, adjacent, causal, window):
    if causal and window is not None:
        window = window[0], None
    real_q, real_k = (bools(data.draw, batch, tokens, adjacent) for tokens in (tokens_q, tokens_k))
    mask = AttentionMask.from_padding(real_q, real_k, causal=causal, window=window)
    expected = dense(real_q, real_k, causal, window)
    check(mask, expected)
    assert not adjacent or mask.rows(*expected.shape).tiles is None  # plain intervals
    # What a GPU, which does not look at the values, does with the same tokens.
    blind = AttentionMask(builders.Padding(real_q, real_k, causal, window, contiguous=False))
    check(blind, expected)
    assert blind.rows(*expected.shape).tiles is not None


def test_self_attention_and_integers():
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    expected = AttentionMask.from_padding(mask.bool(), mask.bool(), causal=True).to_dense()
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.bool):
        assert torch.equal(AttentionMask.from_padding(mask.to(dtype), causal=True).to_dense(), expected)


@pytest.mark.parametrize("window", [None, 3])
def test_as_in_transformers(window):
    """Rows of real queries; in those of padding queries, transformers lets tokens see something."""
    masking = pytest.importorskip("transformers.masking_utils")
    transformers = pytest.importorskip("transformers")
    config = transformers.MistralConfig(
        hidden_size=8, num_attention_heads=1, num_hidden_layers=1, sliding_window=window, attn_implementation="eager"
    )
    real = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 0, 1]])
    make = masking.create_causal_mask if window is None else masking.create_sliding_window_causal_mask
    x = torch.zeros(3, 6, 8)
    theirs = make(config=config, inputs_embeds=x, attention_mask=real, past_key_values=None)[:, 0] == 0
    ours = AttentionMask.from_padding(real, causal=True, window=window).to_dense().view(3, 6, 3, 6)
    for b in range(3):
        rows = real[b].bool()
        assert torch.equal(ours[b, :, b][rows], theirs[b][rows])
        assert not ours[b, :, b][~rows].any()


@pytest.mark.parametrize("holes", [False, True])
def test_padding_contributes_nothing(backend, holes):
    """Each sample is as if it were alone without its padding, and padding gets zeros."""
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 0, 1, 1, 0]])[: 4 if holes else 3]
    x = torch.randn(3, len(real), 5, 2, 8, generator=torch.Generator().manual_seed(0))
    q, k, v = (t.requires_grad_() for t in x)
    mask = AttentionMask.from_padding(real)
    out, lse = attention(q, k, v, mask, return_lse=True, backend=backend)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    for b, row in enumerate(real.bool()):
        alone = [t[b, row].detach().requires_grad_() for t in (q, k, v)]
        expected = attention(*alone, backend=backend)
        torch.testing.assert_close(out[b, row], expected)
        for got, want in zip(grads, torch.autograd.grad(expected.square().sum(), alone), strict=True):
            torch.testing.assert_close(got[b, row], want)
            assert not got[b, ~row].any()
        assert not out[b, ~row].any()
        assert (lse[b][:, ~row] == -torch.inf).all()


def test_memory_is_linear():
    """O(B T): the fields are vectors over tokens, and a tile map."""
    real = torch.ones(4, 512, dtype=torch.bool)
    real[:, ::3] = False
    rows = AttentionMask.from_padding(real).rows(2048, 2048)
    assert sum(x.numel() for x in rows if x is not None) < 10 * 2048
    assert all(x.ndim == 1 for x in padding_rows(real, real, None, None, True)[:4])
