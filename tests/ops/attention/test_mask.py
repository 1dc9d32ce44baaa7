"""Every mask builder equals its own dense definition, and says what is wrong with its metadata."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkernels import AttentionMask, Modality, attention
from mmkernels.ops.attention import tiles
from mmkernels.ops.checks import validating
from mmkernels.testing.attention import MASKS, make_inputs, plain, run
from mmkernels.testing.packing import cu_seqlens_of

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


def check(mask, expected):
    """A mask is the dense one; no visible pair lies outside its key's hull or in a tile that is skipped."""
    tokens_q, tokens_k = expected.shape
    assert torch.equal(mask.to_dense(tokens_q, tokens_k), expected)
    assert mask.density(tokens_q, tokens_k) == pytest.approx(expected.double().mean().item() if expected.numel() else 0)
    rows = mask.rows(tokens_q, tokens_k)
    query = torch.arange(tokens_q)[:, None]
    assert not (expected & ((query < rows.first_q[None]) | (query >= rows.last_q[None]))).any()
    check_tiles(rows, expected, 4, 3)
    assert (rows.tiles is not None) == (rows.span_q is not None)
    if rows.tiles is not None:
        word = torch.arange(rows.tiles.shape[1] * 16)
        unpacked = rows.tiles[:, word // 16] >> 2 * (word % 16) & 3
        states = tiles.tile_states(rows, tokens_k)
        assert torch.equal(unpacked[:, : states.shape[1]], states)
        assert not unpacked[:, states.shape[1] :].any()


def check_tiles(rows, expected, tile_q, tile_k):
    """SKIP has no visible pair, FULL no other; of tiles that are one of both most are found."""
    states = tiles.tile_states(rows, expected.shape[1], tile_q, tile_k)
    for a in range(states.shape[0]):
        for b in range(states.shape[1]):
            block = expected[a * tile_q : (a + 1) * tile_q, b * tile_k : (b + 1) * tile_k]
            if states[a, b] == tiles.SKIP:
                assert not block.any()
            if states[a, b] == tiles.FULL:
                assert block.all()
                assert block.shape[1] == tile_k


@settings(max_examples=300, deadline=None)
@given(segments, st.booleans(), window)
def test_packed(pairs, causal, window):
    window = window if causal else None
    lengths_q, lengths_k = [q for q, _ in pairs], [k for _, k in pairs]
    mask = AttentionMask.packed(cu_seqlens_of(lengths_q), cu_seqlens_of(lengths_k), causal=causal, window=window)
    check(mask, dense_packed(lengths_q, lengths_k, causal, window))


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


# A token of interleaved input: its sample, modality and span (-1: none). Runs of a few tokens, some of them empty.
runs = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.booleans()), max_size=5)
samples = st.lists(runs, max_size=4)


def token_table(samples):
    """(sample, modality, span) of each token; spans are numbered inside a sample."""
    table = []
    for s, sample in enumerate(samples):
        for span, (length, modality, in_span) in enumerate(sample):
            table += [(s, modality, span if in_span else -1)] * length
    return table


def lengths_of(samples):
    return [sum(length for length, _, _ in sample) for sample in samples]


def pairwise(num_q, num_k, visible):
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
    check(mask, pairwise(len(table), len(table), visible))


@settings(max_examples=400, deadline=None)
@given(samples)
def test_cross_only(samples):
    table = token_table(samples)

    def visible(i, j):
        return table[i][0] == table[j][0] and table[i][1] != table[j][1]

    mask = AttentionMask.cross_only(cu_seqlens_of(lengths_of(samples)), column(table, 1, torch.uint8))
    check(mask, pairwise(len(table), len(table), visible))


media = st.lists(
    st.tuples(st.lists(st.integers(-1, 6), max_size=6), st.lists(st.integers(0, 6), max_size=6)), max_size=4
)


@settings(max_examples=600, deadline=None)
@given(media, st.sampled_from(["last", "all_previous", "own"]))
def test_media(samples, mode):
    """Ids of text tokens in any order; those of keys sorted, except for "own", which may hide keys of a negative id."""
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
    check(mask, pairwise(len(queries), len(keys), visible))


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
    check(AttentionMask.from_rows(lo, hi, **pattern), pairwise(len(queries), num_k, visible))


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(sorted(MASKS)), st.data())
def test_kernels_see_what_the_mask_shows(name, data):
    """Through the kernels: with segments of any lengths, out and gradients are those of the dense mask."""
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
    """Two modalities in long runs: of 64 x 64 tiles inside runs none is left to mask."""
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


INT = torch.int32
ZEROS = torch.zeros(2, dtype=INT)


def multimodal(**changed):
    args = {"cu_seqlens": cu_seqlens_of([3]), "modality_ids": torch.ones(3, dtype=torch.uint8)}
    return AttentionMask.multimodal(**(args | {"span_ids": torch.tensor([0, 0, -1], dtype=INT)} | changed))


def media_mask(**changed):
    args = {"cu_seqlens_q": cu_seqlens_of([2]), "cu_seqlens_k": cu_seqlens_of([2])}
    return AttentionMask.media(**(args | {"media_ids_q": ZEROS, "media_ids_k": ZEROS} | changed))


def from_rows(**changed):
    return AttentionMask.from_rows(**({"lo": ZEROS, "hi": ZEROS + 2} | changed))


BAD = [
    (lambda: AttentionMask.packed([0, 3]), TypeError, r"cu_seqlens_q: expected \[S\+1\] int32"),
    (lambda: AttentionMask.packed(torch.tensor([0.0, 3.0])), TypeError, r"\[S\+1\] int32, or another integer dtype"),
    (
        lambda: AttentionMask.packed(torch.tensor([0, 2**32 + 3])),
        ValueError,
        "cu_seqlens_q: expected numbers that fit int32, got 4294967299 at index 1",
    ),
    (lambda: AttentionMask.packed(torch.zeros(2, 2, dtype=INT)), ValueError, "cu_seqlens_q: "),
    (lambda: AttentionMask.packed(torch.tensor([], dtype=INT)), ValueError, "cu_seqlens_q: expected at least one"),
    (lambda: AttentionMask.packed(torch.tensor([0, 5, 3], dtype=INT)), ValueError, "decreasing .*, got 3 at index 2"),
    (lambda: AttentionMask.packed(torch.tensor([1, 5], dtype=INT)), ValueError, "0 at index 0, got 1 at index 0"),
    (
        lambda: AttentionMask.packed(cu_seqlens_of([1, 2]), cu_seqlens_of([3])),
        ValueError,
        "cu_seqlens_k: expected 3 bound",
    ),
    (
        lambda: AttentionMask.packed(cu_seqlens_of([3]), window=2),
        ValueError,
        "window: expected None without causal=True",
    ),
    (
        lambda: AttentionMask.packed(cu_seqlens_of([3]), causal=True, window=0),
        ValueError,
        "window: expected at least 1",
    ),
    (
        lambda: AttentionMask.prefix(cu_seqlens_of([3]), torch.tensor([4], dtype=INT)),
        ValueError,
        "prefix_lengths: .* 4",
    ),
    (lambda: AttentionMask.from_rows(cu_seqlens_of([3]), cu_seqlens_of([3, 1])), ValueError, "hi: "),
    (
        lambda: AttentionMask.from_rows(torch.tensor([2], dtype=INT), torch.tensor([1], dtype=INT)),
        ValueError,
        "hi: expected at least lo, got 1 at index 0",
    ),
    (
        lambda: AttentionMask.packed(cu_seqlens_of([9])).rows(5, 5),
        ValueError,
        "cu_seqlens_q: expected at most 5 tokens",
    ),
    (lambda: multimodal(modality_ids=torch.zeros(3)), TypeError, r"modality_ids: expected \[T\] uint8, or another int"),
    (
        lambda: multimodal(modality_ids=torch.tensor([0, 256, 0])),
        ValueError,
        "modality_ids: expected numbers that fit uint8, got 256 at index 1",
    ),
    (
        lambda: multimodal(modality_ids=torch.tensor([0, 32, 0], dtype=torch.uint8)),
        ValueError,
        "modality_ids: .*got 32",
    ),
    (lambda: multimodal(span_ids=torch.zeros(3)), TypeError, r"span_ids: expected \[T\] int32"),
    (lambda: multimodal(span_ids=torch.zeros(4, dtype=INT)), ValueError, r"span_ids: expected \[3\] like modality_ids"),
    (
        lambda: multimodal(span_ids=torch.tensor([4, -1, 4], dtype=INT)),
        ValueError,
        "contiguous, got id 4 again at index 2",
    ),
    (lambda: multimodal(cu_seqlens=cu_seqlens_of([4])), ValueError, "cu_seqlens: expected at most 3 tokens"),
    (lambda: multimodal(window=0), ValueError, "window: expected at least 1 key"),
    (lambda: multimodal(window=2.0), TypeError, "window: expected an int or None"),
    (lambda: multimodal(bidirectional=(32,)), ValueError, r"bidirectional: expected modalities in \[0, 32\)"),
    (lambda: multimodal(bidirectional="image"), TypeError, "bidirectional: expected a sequence of modalities"),
    (lambda: multimodal().rows(4, 4), ValueError, r"mask: span_ids: expected \[4\], one per token"),
    (lambda: multimodal().rows(3, 4), ValueError, "as many queries as keys for a multimodal mask"),
    (lambda: media_mask(mode="first"), ValueError, "mode: expected 'last', 'all_previous' or 'own', got 'first'"),
    (
        lambda: media_mask(media_ids_k=torch.tensor([1, 0], dtype=INT)),
        ValueError,
        "media_ids_k: .*non-decreasing.*got 0 at index 1",
    ),
    (
        lambda: media_mask(media_ids_k=torch.tensor([-1, 0], dtype=INT)),
        ValueError,
        "media_ids_k: expected at least 0, got -1",
    ),
    (lambda: media_mask(media_ids_q=torch.zeros(2)), TypeError, "media_ids_q: .*int32"),
    (lambda: media_mask(cu_seqlens_k=cu_seqlens_of([3])), ValueError, "cu_seqlens_k: expected at most 2 tokens"),
    (lambda: media_mask().rows(3, 2), ValueError, r"mask: media_ids_q: expected \[3\], one per token"),
    (
        lambda: AttentionMask.cross_only(cu_seqlens_of([1]), torch.tensor([200], dtype=torch.uint8)),
        ValueError,
        r"modality_ids: expected ids in \[0, 32\), got 200 at index 0",
    ),
    (lambda: from_rows(span_q=ZEROS), ValueError, "span_q, span_k: expected both or neither"),
    (lambda: from_rows(allow_q=ZEROS), ValueError, "class_k: expected the class of each key, required with allow_q"),
    (lambda: from_rows(class_q=ZEROS), ValueError, "class_k: expected the class of each key"),
    (lambda: from_rows(allow_q=ZEROS.float(), class_k=ZEROS), TypeError, r"allow_q: expected \[Tq\] int32"),
    (
        lambda: from_rows(allow_q=ZEROS.long() + 2**32, class_k=ZEROS),
        ValueError,
        "allow_q: expected numbers that fit int32, got 4294967296 at index 0",
    ),
    (lambda: from_rows(hi=ZEROS.long() + 2**32), ValueError, "hi: expected numbers that fit int32"),
    (lambda: from_rows(class_k=ZEROS + 32), ValueError, r"class_k: expected classes in \[0, 32\), got 32 at index 0"),
    (lambda: from_rows(class_k=ZEROS - 1), ValueError, r"class_k: expected classes in \[0, 32\), got -1 at index 0"),
    (lambda: from_rows(span_q=ZEROS[:1], span_k=ZEROS), ValueError, r"span_q: expected \[2\] like lo"),
    (
        lambda: from_rows(span_q=ZEROS, span_k=ZEROS).rows(2, 3),
        ValueError,
        r"mask: span_k: expected \[3\], one per token",
    ),
    (
        lambda: from_rows(span_q=ZEROS, span_k=ZEROS, class_k=ZEROS[:1]),
        ValueError,
        r"class_k: expected \[2\] like span_k",
    ),
    (lambda: from_rows(lo=ZEROS - 1), ValueError, "lo: expected at least 0, got -1 at index 0"),
    (lambda: from_rows().rows(2, 1), ValueError, "hi: expected at most 1 keys, got 2 at index 0"),
    (lambda: from_rows().with_classes(ZEROS + 40), ValueError, r"class_q: expected classes in \[0, 32\), got 40"),
    (lambda: from_rows().with_classes(ZEROS.bool()), TypeError, r"class_q: expected \[Tq\] int32, or another integer"),
    (lambda: from_rows().with_classes(ZEROS.long() + 2**32), ValueError, "class_q: expected numbers that fit int32"),
]


SEGMENTS, KINDS = torch.tensor([0, 4, 9]), torch.tensor([1, 1, 0, 0, 0, 1, 1, 1, 0])
ITEMS, MEDIA = torch.tensor([0, 0, -1, -1, -1, 1, 1, 1, -1]), torch.tensor([0, 0, 1, 1, 0, 1, 1, 2, 2])
BUILDERS = {
    "packed": lambda to: AttentionMask.packed(to(SEGMENTS), to(SEGMENTS), causal=True),
    "prefix": lambda to: AttentionMask.prefix(to(SEGMENTS), to(torch.tensor([2, 3]))),
    "multimodal": lambda to: AttentionMask.multimodal(to(SEGMENTS), to(KINDS), to(ITEMS), bidirectional=(1,)),
    "media": lambda to: AttentionMask.media(to(SEGMENTS), to(SEGMENTS), to(ITEMS), to(MEDIA)),
    "media, own": lambda to: AttentionMask.media(to(SEGMENTS), to(SEGMENTS), to(ITEMS), to(MEDIA), mode="own"),
    "cross_only": lambda to: AttentionMask.cross_only(to(SEGMENTS), to(KINDS)),
    "from_rows": lambda to: AttentionMask.from_rows(
        to(ITEMS.clamp(min=0)), to(ITEMS + 8), span_q=to(ITEMS), span_k=to(MEDIA), allow_q=to(KINDS), class_q=to(KINDS),
        class_k=to(MEDIA),
    ),
    "with_classes": lambda to: AttentionMask.packed(to(SEGMENTS)).with_classes(to(KINDS), to(MEDIA)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.int8], ids=str)
@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_any_integer_dtype(build, dtype):
    """torch's own integers are int64; the rows are the same to the bit."""
    mask, expected = build(lambda x: x.to(dtype)), build(lambda x: x.to(INT))
    for got, want in zip(mask.rows(9, 9), expected.rows(9, 9), strict=True):
        assert (got is None) == (want is None)
        assert got is None or (got.dtype == want.dtype and torch.equal(got, want))
    assert (mask.classes is None) == (expected.classes is None)
    q, k = torch.randn(2, 9, 2, 8).unbind()
    bias = {} if mask.classes is None else {"pair_bias": torch.randn(2, 3, 3)}
    assert torch.equal(attention(q, k, k, mask, **bias), attention(q, k, k, expected, **bias))


def test_a_class_in_the_sign_bit():
    """In int64 class 31 is 2^31, which int32 holds as a sign."""
    classes, allow = torch.tensor([31, 0]), torch.tensor([1 << 31, (1 << 31) + 1])
    mask = AttentionMask.from_rows(ZEROS, ZEROS + 2, allow_q=allow, class_k=classes)
    assert mask.to_dense().tolist() == [[True, False], [True, True]]


@pytest.mark.parametrize("window", [2**31 - 1, 2**40, 2**63 - 1, 2**70])
def test_a_window_beyond_int32_is_none(window):
    for build in (
        lambda window: AttentionMask.packed(SEGMENTS, causal=True, window=window),
        lambda window: AttentionMask.multimodal(SEGMENTS, KINDS, ITEMS, bidirectional=(1,), window=window),
    ):
        for got, want in zip(build(window).rows(9, 9), build(9).rows(9, 9), strict=True):
            assert (got is None and want is None) or torch.equal(got, want)


@pytest.mark.parametrize(("build", "error", "message"), BAD)
def test_a_mistake_is_named(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_a_mask_serves_one_pair_of_sizes():
    mask = AttentionMask.packed(cu_seqlens_of([2, 3]))
    mask.rows(5, 5)
    with pytest.raises(ValueError, match="mask: expected q and k of 5 and 5 tokens, the sizes of its first use"):
        mask.rows(6, 6)


def test_values_on_a_device_are_checked_when_asked(monkeypatch):
    """As on a GPU, where nothing looks at values until validate() or MMKERNELS_VALIDATE asks for it."""
    from mmkernels.ops.attention import mask as module

    monkeypatch.setattr(module, "readable", lambda tensor: validating())
    monkeypatch.setenv("MMKERNELS_VALIDATE", "0")
    bad = AttentionMask.packed(torch.tensor([0, 5, 3], dtype=INT))
    with pytest.raises(ValueError, match="non-decreasing boundaries, got 3 at index 2"):
        bad.validate()
    monkeypatch.setenv("MMKERNELS_VALIDATE", "1")
    with pytest.raises(ValueError, match="non-decreasing boundaries, got 3 at index 2"):
        AttentionMask.packed(torch.tensor([0, 5, 3], dtype=INT))


def test_a_mask_moves_with_its_classes():
    mask = multimodal().to("cpu")
    assert torch.equal(mask.to_dense(), multimodal().to_dense())
    assert torch.equal(mask.classes[0], multimodal().classes[0])
    assert AttentionMask.packed(cu_seqlens_of([2])).classes is None
    other = AttentionMask.packed(cu_seqlens_of([2])).with_classes(ZEROS)
    assert other.to("cpu").classes is not None
    assert int(Modality.IMAGE) == 1
