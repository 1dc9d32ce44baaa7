"""Every mask builder equals its dense definition, and so do the tiles that it skips or marks full."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import check

from mmkernels import AttentionMask
from mmkernels.ops.attention import tiles
from mmkernels.testing.attention import MASKS, make_inputs, plain, run
from mmkernels.testing.packing import cu_seqlens_of

segments = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=6)
window = st.none() | st.integers(1, 9)
side = st.none() | st.integers(0, 9)
pair_of_sides = st.none() | st.tuples(side, side)


def dense_packed(lengths_q, lengths_k, causal, window):
    """The definition, pair by pair; `window` is an int or a pair."""
    if not isinstance(window, tuple):
        window = (None if window is None else window - 1, None)
    left, right = window
    right = 0 if causal else right
    mask = torch.zeros(sum(lengths_q), sum(lengths_k), dtype=torch.bool)
    begin_q = begin_k = 0
    for len_q, len_k in zip(lengths_q, lengths_k, strict=True):
        for p in range(len_q):
            last = p + len_k - len_q
            for j in range(len_k):
                visible = (left is None or j >= last - left) and (right is None or j <= last + right)
                mask[begin_q + p, begin_k + j] = visible
        begin_q, begin_k = begin_q + len_q, begin_k + len_k
    return mask


@settings(max_examples=300, deadline=None)
@given(segments, st.booleans(), window)
def test_packed(pairs, causal, window):
    window = window if causal else None
    lengths_q, lengths_k = [q for q, _ in pairs], [k for _, k in pairs]
    mask = AttentionMask.packed(cu_seqlens_of(lengths_q), cu_seqlens_of(lengths_k), causal=causal, window=window)
    check(mask, dense_packed(lengths_q, lengths_k, causal, window))


@settings(max_examples=300, deadline=None)
@given(segments, st.booleans(), side, side)
def test_windows_of_two_sides(pairs, causal, left, right):
    right = None if causal and right else right
    lengths_q, lengths_k = [q for q, _ in pairs], [k for _, k in pairs]
    cu = cu_seqlens_of(lengths_q), cu_seqlens_of(lengths_k)
    mask = AttentionMask.packed(*cu, causal=causal, window=(left, right))
    check(mask, dense_packed(lengths_q, lengths_k, causal, (left, right)))
    if causal and left is not None:
        same = AttentionMask.packed(*cu, causal=True, window=left + 1).rows(sum(lengths_q), sum(lengths_k))
        for ours, theirs in zip(mask.rows(sum(lengths_q), sum(lengths_k)), same, strict=True):
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 4),
    st.integers(0, 7),
    st.none() | st.integers(0, 7),
    st.booleans(),
    st.none() | st.tuples(side, side),
)
def test_batched(batch, tokens_q, tokens_k, causal, window):
    if causal and window is not None:
        window = window[0], None
    mask = AttentionMask.batched(batch, tokens_q, tokens_k, causal=causal, window=window)
    tokens_k = tokens_q if tokens_k is None else tokens_k
    check(mask, dense_packed([tokens_q] * batch, [tokens_k] * batch, causal, window))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 7), st.floats(0, 1)), max_size=6))
def test_prefix(samples):
    lengths = [length for length, _ in samples]
    prefixes = [round(share * length) for length, share in samples]
    mask = AttentionMask.prefix(cu_seqlens_of(lengths), torch.tensor(prefixes, dtype=torch.int32))
    tokens = sum(lengths)
    expected = torch.zeros(tokens, tokens, dtype=torch.bool)
    begin = 0
    for length, prefix in zip(lengths, prefixes, strict=True):
        for p in range(length):
            expected[begin + p, begin : begin + max(p + 1, prefix)] = True
        begin += length
    check(mask, expected)


# A token of interleaved input: its sample, modality and span (-1: none). Runs of a few tokens, some empty.
runs = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.booleans()), max_size=5)
samples = st.lists(runs, max_size=4)


def token_table(samples):
    """(sample, modality, span) of each token; spans are numbered within a sample."""
    table = []
    for s, sample in enumerate(samples):
        for span, (length, modality, in_span) in enumerate(sample):
            table += [(s, modality, span if in_span else -1)] * length
    return table


def lengths_of(samples):
    return [sum(length for length, _, _ in sample) for sample in samples]


def pair_by_pair(num_q, num_k, visible):
    dense = torch.zeros(num_q, num_k, dtype=torch.bool)
    for i in range(num_q):
        for j in range(num_k):
            dense[i, j] = visible(i, j)
    return dense


def column(table, at, dtype):
    return torch.tensor([row[at] for row in table], dtype=dtype)


@settings(max_examples=600, deadline=None)
@given(samples, window, st.sets(st.integers(0, 3)))
def test_multimodal(samples, window, bidirectional):
    table = token_table(samples)

    def visible(i, j):
        (sample, modality, span), (other, _, other_span) = table[i], table[j]
        if sample != other or (window is not None and j <= i - window):
            return False
        return j <= i or (span >= 0 and span == other_span and modality in bidirectional)

    mask = AttentionMask.multimodal(
        cu_seqlens_of(lengths_of(samples)),
        column(table, 1, torch.uint8),
        column(table, 2, torch.int32),
        bidirectional=tuple(bidirectional),
        window=window,
    )
    check(mask, pair_by_pair(len(table), len(table), visible))


@settings(max_examples=400, deadline=None)
@given(samples)
def test_cross_only(samples):
    table = token_table(samples)

    def visible(i, j):
        return table[i][0] == table[j][0] and table[i][1] != table[j][1]

    mask = AttentionMask.cross_only(cu_seqlens_of(lengths_of(samples)), column(table, 1, torch.uint8))
    check(mask, pair_by_pair(len(table), len(table), visible))


media = st.lists(
    st.tuples(st.lists(st.integers(-1, 6), max_size=6), st.lists(st.integers(0, 6), max_size=6)), max_size=4
)


@settings(max_examples=600, deadline=None)
@given(media, st.sampled_from(["last", "all_previous", "own"]))
def test_media(samples, mode):
    """Ids of text tokens in any order; ids of keys sorted, except for "own", which may hide keys with a negative id."""
    queries = [(s, m) for s, (text, _) in enumerate(samples) for m in text]
    keys = [
        (s, m if mode != "own" else m - 1)
        for s, (_, of) in enumerate(samples)
        for m in (of if mode == "own" else sorted(of))
    ]

    def visible(i, j):
        (sample, medium), (other, of) = queries[i], keys[j]
        if sample != other or medium < 0:
            return False
        if mode == "own":
            return of == medium
        if mode == "all_previous":
            return of <= medium
        return of == max((m for s, m in keys if s == sample and m <= medium), default=None)

    mask = AttentionMask.media(
        cu_seqlens_of([len(text) for text, _ in samples]),
        cu_seqlens_of([len(of) for _, of in samples]),
        column(queries, 1, torch.int32),
        column(keys, 1, torch.int32),
        mode=mode,
    )
    check(mask, pair_by_pair(len(queries), len(keys), visible))


row = st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(-2, 2), st.integers(-(2**31), 2**31 - 1))
key = st.tuples(st.integers(-2, 2), st.integers(0, 31))


@settings(max_examples=600, deadline=None)
@given(st.lists(row, max_size=10), st.lists(key, max_size=12), st.booleans(), st.booleans())
def test_from_rows(queries, keys, spans, classes):
    num_k = len(keys)
    ends = [sorted((min(a, num_k), min(b, num_k))) for a, b, _, _ in queries]

    def visible(i, j):
        inside = ends[i][0] <= j < ends[i][1]
        same = spans and queries[i][2] == keys[j][0]
        allowed = classes and queries[i][3] >> keys[j][1] & 1 == 1
        return inside and (same or allowed or not (spans or classes))

    pattern = {}
    if spans:
        pattern |= {"span_q": column(queries, 2, torch.int32), "span_k": column(keys, 0, torch.int32)}
    if classes:
        pattern |= {"allow_q": column(queries, 3, torch.int32), "class_k": column(keys, 1, torch.uint8)}
    lo, hi = (torch.tensor([end[side] for end in ends], dtype=torch.int32) for side in (0, 1))
    check(AttentionMask.from_rows(lo, hi, **pattern), pair_by_pair(len(queries), num_k, visible))


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(sorted(MASKS)), st.data())
def test_kernels_see_what_the_mask_shows(name, data):
    """Through the kernels: for segments of any lengths, out and gradients equal the dense mask's."""
    case = MASKS[name]
    count = data.draw(st.integers(1, 4))
    lengths = st.lists(st.sampled_from([0, 1, 2, 63, 64, 65, 130, 200]), min_size=count, max_size=count)
    lengths_q = data.draw(lengths)
    lengths_k = data.draw(lengths) if case.lengths_k else lengths_q
    mask = case.build(cu_seqlens_of(lengths_q), cu_seqlens_of(lengths_k), **case.options)
    x = make_inputs(sum(lengths_q), sum(lengths_k), dim=16, dtype=torch.float64, mask=mask)
    for (what, got), (_, expected) in zip(run(x).items(), plain(x).items(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11, msg=lambda m, what=what: f"{what}: {m}")


@pytest.mark.parametrize(
    "lengths",
    [[3] * 3000, [1, 2, 0] * 1500, [9001], [1, 9000, 0, 3]],
    ids=["tiny", "tiny and empty", "one huge", "huge among tiny"],
)
def test_segments_of_every_size(lengths):
    cu, tokens = cu_seqlens_of(lengths), sum(lengths)
    modality = (torch.arange(tokens) % 3 == 0).byte()
    rows = AttentionMask.cross_only(cu, modality).rows(tokens, tokens)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    some = torch.randint(0, tokens, (200,))
    some_rows = rows._replace(lo=rows.lo[some], hi=rows.hi[some], span_q=rows.span_q[some], allow_q=rows.allow_q[some])
    expected = (owner[some][:, None] == owner) & (modality[some][:, None] != modality)
    assert torch.equal(some_rows.visible().dense(tokens), expected)
    assert rows.tiles.numel() * 4 <= (tokens / 128 + 1) * (tokens / 64 / 16 + 1) * 4


def test_a_map_finds_what_it_may_skip_and_take_whole():
    """Two modalities in long runs: no 64 x 64 tile inside a run needs masking."""
    modality = torch.repeat_interleave(
        torch.tensor([0, 1, 0, 1], dtype=torch.uint8), torch.tensor([256, 128, 128, 256])
    )
    rows = AttentionMask.cross_only(cu_seqlens_of([768]), modality).rows(768, 768)
    states = tiles.tile_states(rows, 768)
    assert (states != tiles.PARTIAL).all()
    assert (states == tiles.FULL).float().mean() == pytest.approx(0.5)


def test_plot(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    case = MASKS["image_spans"]
    case.mask().plot(tmp_path / "mask.png", tile=(8, 8))
    MASKS["packed"].mask().plot(str(tmp_path / "packed.svg"))
    assert (tmp_path / "mask.png").read_bytes()[:4] == b"\x89PNG"
    assert b"</svg>" in (tmp_path / "packed.svg").read_bytes()
    assert matplotlib.get_backend() is not None
    with pytest.raises(ValueError, match="tile: expected two sizes of at least 1"):
        case.mask().plot(tmp_path / "x.png", tile=(0, 8))


def test_tokens_after_the_last_segment_belong_to_none():
    mask = AttentionMask.packed(cu_seqlens_of([2, 3]))
    dense = mask.to_dense(7, 7)
    assert not dense[5:].any()
    assert not dense[:, 5:].any()


def test_positions():
    """The key at each query's position, aligned at the samples' ends."""
    cu_q, cu_k = cu_seqlens_of((3, 0, 4)), cu_seqlens_of((5, 2, 1))
    expected = [2, 3, 4, 4, 5, 6, 7]
    mask = AttentionMask.packed(cu_q, cu_k)
    assert mask.positions(7, 8).tolist() == expected
    assert mask.positions(7, 8) is mask.positions(7, 8)
    assert AttentionMask.batched(2, 3, 2).positions(6, 4).tolist() == [-1, 0, 1, 1, 2, 3]
    padded = AttentionMask.from_padding(torch.ones(2, 3).bool(), torch.ones(2, 2).bool())
    assert padded.positions(6, 4).tolist() == [-1, 0, 1, 1, 2, 3]
    assert AttentionMask.prefix(cu_q, torch.zeros(3, dtype=torch.int32)).positions(7, 7).tolist() == list(range(7))
    other = mask.with_positions(torch.arange(7)).with_classes(torch.zeros(7).byte(), torch.zeros(8).byte()).to("cpu")
    assert other.positions(7, 8).tolist() == list(range(7))
    assert torch.equal(other.to_dense(7, 8), mask.to_dense(7, 8))
    with torch.inference_mode():
        made = AttentionMask.packed(cu_q, cu_k).positions(7, 8)
    assert not made.is_inference()
