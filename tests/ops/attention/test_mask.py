"""Every mask builder equals its own dense definition, and says what is wrong with its metadata."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkernels import AttentionMask
from mmkernels.testing.attention import cu_seqlens

segments = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=6)
window = st.none() | st.integers(1, 9)


def dense_packed(lengths_q, lengths_k, causal, window):
    """The definition, pair by pair."""
    mask = torch.zeros(sum(lengths_q), sum(lengths_k), dtype=torch.bool)
    begin_q = begin_k = 0
    for len_q, len_k in zip(lengths_q, lengths_k, strict=True):
        for p in range(len_q):
            last = p + len_k - len_q
            for j in range(len_k):
                visible = not causal or (j <= last and (window is None or j > last - window))
                mask[begin_q + p, begin_k + j] = visible
        begin_q, begin_k = begin_q + len_q, begin_k + len_k
    return mask


def check_hull(mask, tokens_q, tokens_k):
    """Every visible pair lies inside its key's hull, without which backward would miss it."""
    dense, rows = mask.to_dense(tokens_q, tokens_k), mask.rows(tokens_q, tokens_k)
    query = torch.arange(tokens_q)[:, None]
    assert not (dense & ((query < rows.first_q[None]) | (query >= rows.last_q[None]))).any()


@settings(max_examples=300, deadline=None)
@given(segments, st.booleans(), window)
def test_packed(pairs, causal, window):
    window = window if causal else None
    lengths_q, lengths_k = [q for q, _ in pairs], [k for _, k in pairs]
    mask = AttentionMask.packed(cu_seqlens(lengths_q), cu_seqlens(lengths_k), causal=causal, window=window)
    tokens = sum(lengths_q), sum(lengths_k)
    expected = dense_packed(lengths_q, lengths_k, causal, window)
    assert torch.equal(mask.to_dense(*tokens), expected)
    assert mask.density(*tokens) == pytest.approx(expected.float().mean().item() if expected.numel() else 0.0)
    check_hull(mask, *tokens)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 7), st.floats(0, 1)), max_size=6))
def test_prefix(samples):
    lengths = [length for length, _ in samples]
    prefixes = [round(share * length) for length, share in samples]
    mask = AttentionMask.prefix(cu_seqlens(lengths), torch.tensor(prefixes, dtype=torch.int32))
    tokens = sum(lengths)
    expected = torch.zeros(tokens, tokens, dtype=torch.bool)
    begin = 0
    for length, prefix in zip(lengths, prefixes, strict=True):
        for p in range(length):
            expected[begin + p, begin : begin + max(p + 1, prefix)] = True
        begin += length
    assert torch.equal(mask.to_dense(tokens, tokens), expected)
    check_hull(mask, tokens, tokens)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 12), st.data())
def test_from_rows(tokens_k, data):
    ends = data.draw(st.lists(st.tuples(st.integers(0, tokens_k), st.integers(0, tokens_k)), max_size=10))
    lo = torch.tensor([min(pair) for pair in ends], dtype=torch.int32)
    hi = torch.tensor([max(pair) for pair in ends], dtype=torch.int32)
    mask = AttentionMask.from_rows(lo, hi)
    key = torch.arange(tokens_k)
    assert torch.equal(mask.to_dense(len(ends), tokens_k), (lo[:, None] <= key) & (key < hi[:, None]))
    check_hull(mask, len(ends), tokens_k)


def test_tokens_after_the_last_segment_belong_to_none():
    mask = AttentionMask.packed(cu_seqlens([2, 3]))
    dense = mask.to_dense(7, 7)
    assert not dense[5:].any()
    assert not dense[:, 5:].any()


INT = torch.int32
BAD = [
    (lambda: AttentionMask.packed([0, 3]), TypeError, r"cu_seqlens_q: expected \[S\+1\] int32"),
    (lambda: AttentionMask.packed(torch.tensor([0, 3])), TypeError, "cu_seqlens_q: .*int64"),
    (lambda: AttentionMask.packed(torch.zeros(2, 2, dtype=INT)), ValueError, "cu_seqlens_q: "),
    (lambda: AttentionMask.packed(torch.tensor([], dtype=INT)), ValueError, "cu_seqlens_q: expected at least one"),
    (lambda: AttentionMask.packed(torch.tensor([0, 5, 3], dtype=INT)), ValueError, "never fall, got 3 at index 2"),
    (lambda: AttentionMask.packed(torch.tensor([1, 5], dtype=INT)), ValueError, "0 at index 0, got 1 at index 0"),
    (lambda: AttentionMask.packed(cu_seqlens([1, 2]), cu_seqlens([3])), ValueError, "cu_seqlens_k: expected 3 bound"),
    (lambda: AttentionMask.packed(cu_seqlens([3]), window=2), ValueError, "window: expected None without causal=True"),
    (lambda: AttentionMask.packed(cu_seqlens([3]), causal=True, window=0), ValueError, "window: expected at least 1"),
    (
        lambda: AttentionMask.prefix(cu_seqlens([3]), torch.tensor([4], dtype=INT)),
        ValueError,
        "prefix_lengths: .* 4",
    ),
    (lambda: AttentionMask.from_rows(cu_seqlens([3]), cu_seqlens([3, 1])), ValueError, "hi: "),
    (
        lambda: AttentionMask.from_rows(torch.tensor([2], dtype=INT), torch.tensor([1], dtype=INT)),
        ValueError,
        "hi: expected at least lo, got 1 at index 0",
    ),
    (lambda: AttentionMask.packed(cu_seqlens([9])).rows(5, 5), ValueError, "cu_seqlens_q: expected at most 5 tokens"),
    (lambda: AttentionMask.multimodal(), NotImplementedError, "multimodal: not supported yet"),
    (lambda: AttentionMask.media(), NotImplementedError, "media: not supported yet"),
    (lambda: AttentionMask.cross_only(), NotImplementedError, "cross_only: not supported yet"),
]


@pytest.mark.parametrize(("build", "error", "message"), BAD)
def test_a_mistake_is_named(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_a_mask_serves_one_pair_of_sizes():
    mask = AttentionMask.packed(cu_seqlens([2, 3]))
    mask.rows(5, 5)
    with pytest.raises(ValueError, match="mask: expected q and k of 5 and 5 tokens, which it was laid out for"):
        mask.rows(6, 6)
