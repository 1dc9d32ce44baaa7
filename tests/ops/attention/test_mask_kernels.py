"""Random masks of every builder through the kernels, forward and backward: equal to the dense mask."""

import backends
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmkernels import AttentionMask
from mmkernels.testing.attention import make_inputs, plain, run
from mmkernels.testing.packing import cu_seqlens_of

# Around the edges of tiles (16 to 128 queries, 16 to 64 keys), and small enough for the interpreter.
length = st.sampled_from([0, 1, 2, 15, 17, 33, 64, 65])
window = st.none() | st.sampled_from([1, 5, 40])


def sides(causal):
    reach = st.none() | st.sampled_from([0, 4, 33])
    return st.tuples(reach, st.sampled_from([None, 0]) if causal else reach)


def column(values, dtype):
    return torch.tensor(values, dtype=dtype)


def in_runs(draw, tokens, values):
    """A value per token that changes every few to every many tokens."""
    found = []
    while len(found) < tokens:
        found += [draw(values)] * draw(st.sampled_from([1, 3, 16, 40, 70]))
    return found[:tokens]


def lengths_of(draw, most=3):
    return draw(st.lists(length, min_size=1, max_size=most))


def packed(draw):
    lengths_q = lengths_of(draw)
    lengths_k = draw(st.lists(length, min_size=len(lengths_q), max_size=len(lengths_q)))
    causal = draw(st.booleans())
    options = {
        "causal": causal,
        "window": draw(sides(causal)) if draw(st.booleans()) else draw(window) if causal else None,
    }
    return (
        AttentionMask.packed(cu_seqlens_of(lengths_q), cu_seqlens_of(lengths_k), **options),
        sum(lengths_q),
        sum(lengths_k),
    )


def padding(draw):
    """Of one sample, too, whose intervals are all equal."""
    batch, tokens_q = draw(st.integers(1, 3)), draw(length)
    tokens_k = draw(st.sampled_from([tokens_q, draw(length)]))
    real = [
        torch.stack([column(in_runs(draw, tokens, st.booleans()), torch.bool) for _ in range(batch)])
        if draw(st.booleans())
        else torch.ones(batch, tokens, dtype=torch.bool)
        for tokens in (tokens_q, tokens_k)
    ]
    causal = draw(st.booleans())
    mask = AttentionMask.from_padding(*real, causal=causal, window=draw(st.none() | sides(causal)))
    return mask, batch * tokens_q, batch * tokens_k


def prefix(draw):
    lengths = lengths_of(draw)
    prefixes = [draw(st.integers(0, n)) for n in lengths]
    return AttentionMask.prefix(cu_seqlens_of(lengths), column(prefixes, torch.int32)), sum(lengths), sum(lengths)


def multimodal(draw):
    lengths = lengths_of(draw)
    tokens = sum(lengths)
    spans, modalities = [], []
    for n in lengths:  # spans are numbered within a sample and have one modality
        run_of = in_runs(draw, n, st.tuples(st.integers(0, 3), st.booleans()))
        starts = [i == 0 or run_of[i] != run_of[i - 1] for i in range(n)]
        number = torch.tensor(starts, dtype=torch.int32).cumsum(0).tolist()
        modalities += [modality for modality, _ in run_of]
        spans += [at if in_span else -1 for at, (_, in_span) in zip(number, run_of, strict=True)]
    bidirectional = tuple(draw(st.sets(st.integers(0, 3))))
    ids = column(modalities, torch.uint8), column(spans, torch.int32)
    mask = AttentionMask.multimodal(cu_seqlens_of(lengths), *ids, bidirectional=bidirectional, window=draw(window))
    return mask, tokens, tokens


def cross_only(draw):
    lengths = lengths_of(draw)
    modalities = in_runs(draw, sum(lengths), st.integers(0, 3))
    mask = AttentionMask.cross_only(cu_seqlens_of(lengths), column(modalities, torch.uint8))
    return mask, sum(lengths), sum(lengths)


def media(draw):
    lengths_q = lengths_of(draw)
    lengths_k = draw(st.lists(length, min_size=len(lengths_q), max_size=len(lengths_q)))
    mode = draw(st.sampled_from(["last", "all_previous", "own"]))
    of_q = in_runs(draw, sum(lengths_q), st.integers(-1, 4))
    of_k = []
    for n in lengths_k:
        of = in_runs(draw, n, st.integers(0, 4))
        of_k += of if mode == "own" else sorted(of)
    ids = column(of_q, torch.int32), column(of_k, torch.int32)
    mask = AttentionMask.media(cu_seqlens_of(lengths_q), cu_seqlens_of(lengths_k), *ids, mode=mode)
    return mask, sum(lengths_q), sum(lengths_k)


def from_rows(draw):
    tokens_q, tokens_k = sum(lengths_of(draw)), sum(lengths_of(draw))
    ends = in_runs(draw, tokens_q, st.tuples(st.integers(0, tokens_k), st.integers(0, tokens_k)))
    lo, hi = (column([pick(pair) for pair in ends], torch.int32) for pick in (min, max))
    pattern = {}
    if draw(st.booleans()):
        spans = (in_runs(draw, n, st.integers(0, 2)) for n in (tokens_q, tokens_k))
        pattern |= dict(zip(("span_q", "span_k"), (column(ids, torch.int32) for ids in spans), strict=True))
    if draw(st.booleans()):
        allow = in_runs(draw, tokens_q, st.sampled_from([0, 1, 5, -1, -(2**31)]))
        pattern["allow_q"] = column(allow, torch.int32)
        pattern["class_k"] = column(in_runs(draw, tokens_k, st.sampled_from([0, 2, 31])), torch.uint8)
    return AttentionMask.from_rows(lo, hi, **pattern), tokens_q, tokens_k


def check(data, builder, backend, dtype, heads, tolerance):
    mask, tokens_q, tokens_k = builder(data.draw)
    x = make_inputs(tokens_q, tokens_k, **heads, dim=16, dtype=dtype, mask=mask)
    truth = plain(x.to(torch.float64), with_lse=True)
    for (what, got), (_, expected) in zip(run(x, backend, with_lse=True).items(), truth.items(), strict=True):
        torch.testing.assert_close(
            got.double(), expected, rtol=tolerance, atol=tolerance, msg=lambda m, what=what: f"{what}: {m}"
        )


BUILDERS = pytest.mark.parametrize("builder", [packed, padding, prefix, multimodal, cross_only, media, from_rows])
FEW = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "derandomize": True}


@BUILDERS
@settings(max_examples=60, **FEW)
@given(data=st.data())
def test_native(builder, data):
    backends.need("attention", "native", torch.float64)
    check(data, builder, "native", torch.float64, {"heads": 2, "kv_heads": 1}, 1e-10)


@BUILDERS
@settings(max_examples=8, **FEW)
@given(data=st.data())
def test_triton(builder, data):
    backends.need("attention", "triton")
    check(data, builder, "triton", torch.float32, {"heads": 1}, 2e-5)


backend = backends.fixture("attention")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whole_tiles_of_rows_that_see_nothing(backend, dtype):
    """Wherever their empty intervals lie: past keys that others see, or before."""
    for at in (0, 70, 300):
        lo, hi = torch.full((290,), at, dtype=torch.int32), torch.full((290,), at, dtype=torch.int32)
        lo[:7], hi[:7] = 3, 90
        x = make_inputs(290, 300, heads=1, dim=16, dtype=dtype, mask=AttentionMask.from_rows(lo, hi))
        result = run(x, backend, with_lse=True)
        assert (result.out[7:] == 0).all() and (result.lse[:, 7:] == -torch.inf).all(), at
        assert (result.dq[7:] == 0).all() and not result.dq[:7].isnan().any(), at
        assert (result.dk[90:] == 0).all() and (result.dv[90:] == 0).all(), at
