"""Metadata of masks: any integer dtype, extreme values, when they are checked, and the error messages."""

import named
import pytest
import torch

from mmkernels import AttentionMask, Modality, attention
from mmkernels.ops.checks import validating
from mmkernels.testing.packing import cu_seqlens_of

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


BAD = {
    "packed": [
        (lambda: AttentionMask.packed([0, 3]), TypeError, r"cu_seqlens_q: expected \[S\+1\] int32"),
        (
            lambda: AttentionMask.packed(torch.tensor([0.0, 3.0])),
            TypeError,
            r"\[S\+1\] int32, or another integer dtype",
        ),
        (
            lambda: AttentionMask.packed(torch.tensor([0, 2**32 + 3])),
            ValueError,
            "cu_seqlens_q: expected numbers that fit int32, got 4294967299 at index 1",
        ),
        (lambda: AttentionMask.packed(torch.zeros(2, 2, dtype=INT)), ValueError, "cu_seqlens_q: "),
        (lambda: AttentionMask.packed(torch.tensor([], dtype=INT)), ValueError, "cu_seqlens_q: expected at least one"),
        (
            lambda: AttentionMask.packed(torch.tensor([0, 5, 3], dtype=INT)),
            ValueError,
            "non-decreasing boundaries, got 3 at index 2",
        ),
        (lambda: AttentionMask.packed(torch.tensor([1, 5], dtype=INT)), ValueError, "0 at index 0, got 1 at index 0"),
        (
            lambda: AttentionMask.packed(cu_seqlens_of([1, 2]), cu_seqlens_of([3])),
            ValueError,
            "cu_seqlens_k: expected 3 bound",
        ),
        (
            lambda: AttentionMask.packed(cu_seqlens_of([3]), window=2),
            ValueError,
            r"window: expected None or a pair \(left, right\) without causal=True",
        ),
        (
            lambda: AttentionMask.packed(cu_seqlens_of([3]), causal=True, window=(1, 1)),
            ValueError,
            r"window: expected None or 0 after a query's position with causal=True, got \(1, 1\)",
        ),
        (lambda: AttentionMask.packed(cu_seqlens_of([3]), window=(1, 2, 3)), ValueError, "window: expected a pair"),
        (
            lambda: AttentionMask.packed(cu_seqlens_of([3]), window=(-1, None)),
            ValueError,
            "window: expected ints of at least 0 or None",
        ),
        (
            lambda: AttentionMask.packed(cu_seqlens_of([3]), window=(1.0, 0)),
            TypeError,
            "window: expected ints of at least 0 or None",
        ),
        (lambda: AttentionMask.packed(cu_seqlens_of([3]), window="3"), TypeError, "window: expected an int, a pair"),
        (
            lambda: AttentionMask.packed(cu_seqlens_of([3]), causal=True, window=0),
            ValueError,
            "window: expected at least 1",
        ),
        (
            lambda: AttentionMask.packed(cu_seqlens_of([9])).rows(5, 5),
            ValueError,
            "cu_seqlens_q: expected at most 5 tokens",
        ),
    ],
    "from_padding": [
        (lambda: AttentionMask.from_padding(torch.ones(2, 3)), TypeError, r"mask: expected \[B, T\] bool or integer"),
        (lambda: AttentionMask.from_padding(torch.ones(3, dtype=INT)), ValueError, r"mask: expected \[B, T\] bool"),
        (
            lambda: AttentionMask.from_padding(torch.tensor([[1, 1], [1, 2]])),
            ValueError,
            r"mask: expected 0 for padding and 1 for a token, got 2 at \[1, 1\]",
        ),
        (
            lambda: AttentionMask.from_padding(torch.ones(2, 3, dtype=INT), torch.ones(3, 3, dtype=INT)),
            ValueError,
            "mask_k: expected batch B=2 like mask",
        ),
        (
            lambda: AttentionMask.from_padding(torch.tensor([[1, 1, 0], [1, 0, 1]]), contiguous=True),
            ValueError,
            "mask: expected adjacent real tokens with contiguous=True, got a gap in sample 1",
        ),
        (
            lambda: AttentionMask.from_padding(torch.ones(2, 3, dtype=INT), contiguous=1),
            TypeError,
            "contiguous: expected a bool",
        ),
        (
            lambda: AttentionMask.from_padding(torch.ones(2, 3, dtype=INT)).rows(8, 8),
            ValueError,
            r"mask: mask: expected \[8\], one per token",
        ),
    ],
    "batched": [
        (lambda: AttentionMask.batched(-1, 3), ValueError, "batch: expected an int of at least 0, got -1"),
        (lambda: AttentionMask.batched(2, 3.0), TypeError, "tokens_q: expected an int of at least 0, got 3.0"),
        (lambda: AttentionMask.batched(2, 3, True), TypeError, "tokens_k: expected an int of at least 0 or None"),
        (lambda: AttentionMask.batched(2**16, 2**16), ValueError, "tokens_q: expected at most 2147483647 tokens"),
    ],
    "prefix": [
        (
            lambda: AttentionMask.prefix(cu_seqlens_of([3]), torch.tensor([4], dtype=INT)),
            ValueError,
            "prefix_lengths: .* 4",
        ),
    ],
    "from_rows": [
        (lambda: AttentionMask.from_rows(cu_seqlens_of([3]), cu_seqlens_of([3, 1])), ValueError, "hi: "),
        (
            lambda: AttentionMask.from_rows(torch.tensor([2], dtype=INT), torch.tensor([1], dtype=INT)),
            ValueError,
            "hi: expected at least lo, got 1 at index 0",
        ),
        (lambda: from_rows(span_q=ZEROS), ValueError, "span_q, span_k: expected both or neither"),
        (
            lambda: from_rows(allow_q=ZEROS),
            ValueError,
            "class_k: expected the class of each key, required with allow_q",
        ),
        (lambda: from_rows(class_q=ZEROS), ValueError, "class_k: expected the class of each key"),
        (lambda: from_rows(allow_q=ZEROS.float(), class_k=ZEROS), TypeError, r"allow_q: expected \[Tq\] int32"),
        (
            lambda: from_rows(allow_q=ZEROS.long() + 2**32, class_k=ZEROS),
            ValueError,
            "allow_q: expected numbers that fit int32, got 4294967296 at index 0",
        ),
        (lambda: from_rows(hi=ZEROS.long() + 2**32), ValueError, "hi: expected numbers that fit int32"),
        (
            lambda: from_rows(class_k=ZEROS + 32),
            ValueError,
            r"class_k: expected classes in \[0, 32\), got 32 at index 0",
        ),
        (
            lambda: from_rows(class_k=ZEROS - 1),
            ValueError,
            r"class_k: expected classes in \[0, 32\), got -1 at index 0",
        ),
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
    ],
    "multimodal": [
        (
            lambda: multimodal(modality_ids=torch.zeros(3)),
            TypeError,
            r"modality_ids: expected \[T\] uint8, or another int",
        ),
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
        (
            lambda: multimodal(span_ids=torch.zeros(4, dtype=INT)),
            ValueError,
            r"span_ids: expected \[3\] like modality_ids",
        ),
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
    ],
    "media": [
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
    ],
    "cross_only": [
        (
            lambda: AttentionMask.cross_only(cu_seqlens_of([1]), torch.tensor([200], dtype=torch.uint8)),
            ValueError,
            r"modality_ids: expected ids in \[0, 32\), got 200 at index 0",
        ),
    ],
    "with_classes": [
        (lambda: from_rows().with_classes(ZEROS + 40), ValueError, r"class_q: expected classes in \[0, 32\), got 40"),
        (
            lambda: from_rows().with_classes(ZEROS.bool()),
            TypeError,
            r"class_q: expected \[Tq\] int32, or another integer",
        ),
        (
            lambda: from_rows().with_classes(ZEROS.long() + 2**32),
            ValueError,
            "class_q: expected numbers that fit int32",
        ),
    ],
}


@pytest.mark.parametrize("builder", BAD)
def test_a_mistake_is_named(builder):
    named.mistakes(*BAD[builder])


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


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_any_integer_dtype(build):
    """torch's default integers are int64; the rows agree bit for bit."""
    expected = build(lambda x: x.to(INT))
    q, k = torch.randn(2, 9, 2, 8).unbind()
    bias = {} if expected.classes is None else {"pair_bias": torch.randn(2, 3, 3)}
    for dtype in (torch.int64, torch.int16, torch.int8):
        mask = build(lambda x, dtype=dtype: x.to(dtype))
        for got, want in zip(mask.rows(9, 9), expected.rows(9, 9), strict=True):
            assert (got is None) == (want is None)
            assert got is None or (got.dtype == want.dtype and torch.equal(got, want))
        assert (mask.classes is None) == (expected.classes is None)
        assert torch.equal(attention(q, k, k, mask, **bias), attention(q, k, k, expected, **bias))


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_kernels_get_contiguous_vectors(build):
    """They read them by their pointers alone."""
    mask = build(lambda x: torch.stack([x, x - 1], -1).to(INT)[..., 0])
    assert all(rows is None or rows.is_contiguous() for rows in mask.rows(9, 9))
    for got, want in zip(mask.rows(9, 9), build(lambda x: x.to(INT)).rows(9, 9), strict=True):
        assert (got is None and want is None) or torch.equal(got, want)


def test_the_rows_of_one_padded_sample_are_contiguous():
    real = torch.ones(1, 9, dtype=torch.bool)
    for options in ({}, {"causal": True}, {"window": (2, None)}, {"contiguous": True}):
        for mask in (AttentionMask.from_padding(real, **options), AttentionMask.from_padding(real[:, :4], real)):
            sizes = len(mask.to_dense()), 9
            assert all(rows is None or rows.is_contiguous() for rows in mask.rows(*sizes)), options


def test_a_class_in_the_sign_bit():
    """In int64 class 31 is 2^31, which is int32's sign bit."""
    classes, allow = torch.tensor([31, 0]), torch.tensor([1 << 31, (1 << 31) + 1])
    mask = AttentionMask.from_rows(ZEROS, ZEROS + 2, allow_q=allow, class_k=classes)
    assert mask.to_dense().tolist() == [[True, False], [True, True]]


def test_a_window_beyond_int32_is_none():
    for build in (
        lambda window: AttentionMask.packed(SEGMENTS, causal=True, window=window),
        lambda window: AttentionMask.multimodal(SEGMENTS, KINDS, ITEMS, bidirectional=(1,), window=window),
    ):
        for window in (2**31 - 1, 2**40, 2**63 - 1, 2**70):
            for got, want in zip(build(window).rows(9, 9), build(9).rows(9, 9), strict=True):
                assert (got is None and want is None) or torch.equal(got, want)


def test_a_mask_serves_one_pair_of_sizes():
    mask = AttentionMask.packed(cu_seqlens_of([2, 3]))
    mask.rows(5, 5)
    with pytest.raises(ValueError, match="mask: expected q and k of 5 and 5 tokens, the sizes of its first use"):
        mask.rows(6, 6)


def test_values_on_a_device_are_checked_when_asked(monkeypatch):
    """As on a GPU, where values are not read until validate() or MMKERNELS_VALIDATE asks for it."""
    from mmkernels.ops.attention import mask_layout as module

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
