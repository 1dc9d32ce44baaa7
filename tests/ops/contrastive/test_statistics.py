"""The statistics of a loss: against PyTorch, with ids, and merged from the parts of several ranks."""

import functools

import backends
import pytest
import torch
from ops.contrastive.shared import IDS, E, N, inputs_of, rows

from mmkernels import ContrastiveStats, infonce, siglip
from mmkernels.ops.contrastive import op
from mmkernels.ops.contrastive.types import (
    LSE,
    MEAN,
    POSITIVE,
    STATISTICS,
    TOTAL,
    Need,
    Pairs,
    merged,
    merged_parts,
    nothing_seen,
)

backend = backends.fixture("contrastive")


@pytest.fixture
def widest(backend) -> torch.dtype:
    """The widest dtype that a backend supports."""
    return torch.float32 if backend == "triton" else torch.float64


@pytest.mark.parametrize("own", [False, True])
def test_statistics(backend, widest, own):
    x, y, scale = inputs_of(N, widest)
    negatives = rows(N * 3 if own else 30, E, 8).to(widest)
    negatives = negatives.view(N, 3, E) if own else negatives
    loss, stats = infonce(x, y, scale, negatives=negatives, return_stats=True, backend=backend)
    assert isinstance(stats, ContrastiveStats)
    others = (negatives @ x[:, :, None])[:, :, 0] if own else x @ negatives.T
    logits, wide = scale * x @ y.T, scale * torch.cat([x @ y.T, others], 1)
    labels, off = torch.arange(N), ~torch.eye(N, dtype=torch.bool)
    torch.testing.assert_close(loss, infonce(x, y, scale, negatives=negatives, backend=backend))
    torch.testing.assert_close(stats.lse_q, wide.logsumexp(1))
    torch.testing.assert_close(stats.lse_k, logits.logsumexp(0))
    torch.testing.assert_close(stats.accuracy_q, (wide.argmax(1) == labels).to(widest).mean())
    torch.testing.assert_close(stats.accuracy_k, (logits.argmax(0) == labels).to(widest).mean())
    torch.testing.assert_close(stats.positive, (logits / scale).diagonal().mean())
    torch.testing.assert_close(stats.negative, (logits / scale)[off].mean())
    entropies = (-(s.softmax(1) * s.log_softmax(1)).sum(1).mean() for s in (wide, logits.T))
    torch.testing.assert_close(stats.entropy, sum(entropies) / 2)
    assert not any(value.requires_grad for value in stats)


def test_statistics_with_ids(backend):
    x, y, scale = inputs_of(N, torch.float32)
    similarity, same = x @ y.T, IDS[:, None] == IDS
    for same_id, positives in (("positive", similarity[same]), ("ignore", similarity.diagonal())):
        _, stats = infonce(x, y, scale, query_ids=IDS, same_id=same_id, return_stats=True, backend=backend)
        torch.testing.assert_close(stats.negative, similarity[~same].mean(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(stats.positive, positives.mean())
        assert stats.lse_q.dtype == torch.float32


def test_statistics_of_siglip(backend):
    x, y, scale = inputs_of(N, torch.float32)
    loss, stats = siglip(x, y, scale, -5.0, return_stats=True, backend=backend)
    torch.testing.assert_close(loss, siglip(x, y, scale, -5.0, backend=backend))
    torch.testing.assert_close(stats.lse_q, (scale * x @ y.T - 5).logsumexp(1))
    torch.testing.assert_close(stats.accuracy_q, ((x @ y.T).argmax(1) == torch.arange(N)).float().mean())


def tolerance(dtype):
    """The tolerance for sums in another order."""
    return dict(rtol=1e-5, atol=2e-6) if dtype == torch.float32 else {}


def statistics(x, y, scale, targets, backend="native", columns=True):
    return op.softmax_fwd(x, y, scale, Pairs(targets), None, None, 0.0, True, columns, backend)


def test_all_parts_merge_as_two_by_two() -> None:
    """In the ring parts meet one by one, after a gather all at once; a column may be unseen by some or by all."""
    generator = torch.Generator().manual_seed(0)
    parts = 10 * torch.randn(5, STATISTICS, 8, dtype=torch.float64, generator=generator)
    unseen = nothing_seen(parts.new_empty(1, 1))[:, 0]
    parts[:3, :, 0] = parts[:, :, 1] = unseen
    parts[4, LSE, 2] = torch.inf
    torch.testing.assert_close(merged_parts(parts), functools.reduce(merged, parts), equal_nan=True)
    torch.testing.assert_close(merged_parts(parts[:1]), parts[0])
    assert merged_parts(parts[:, :, :0]).shape == (STATISTICS, 0)


def test_parts_merge_into_the_whole(backend, widest):
    """As a distributed loss does: local rows against all keys, columns merged over ranks; one rank has no rows."""
    x, y, scale = inputs_of(N, widest)
    assert_close = functools.partial(torch.testing.assert_close, **tolerance(widest))
    targets = torch.arange(N)
    of_rows, of_columns = statistics(x, y, scale, targets, backend)
    parts = [slice(0, 40), slice(40, 40), slice(40, N)]
    seen = [statistics(x[part], y, scale, targets[part], backend) for part in parts]
    assert_close(torch.cat([rows for rows, _ in seen], 1), of_rows)
    columns = torch.stack([columns for _, columns in seen])  # [W, 7, M]
    lse = columns[:, LSE].logsumexp(0)
    assert_close(lse, of_columns[LSE])
    assert_close(((columns[:, LSE] - lse).exp() * columns[:, MEAN]).sum(0), of_columns[MEAN])
    assert_close(columns[:, [POSITIVE, TOTAL]].sum(0), of_columns[[POSITIVE, TOTAL]])
    assert_close(columns[:, 5:].amax(0), of_columns[5:])

    weights = torch.rand(2, 4, N, dtype=torch.float64)

    def backward(part):
        rest = Pairs(targets[part]), None, None, 0.0, None, Need(True, True), backend
        return op.softmax_bwd(weights[0][:, part], weights[1], x[part], y, scale, of_rows[LSE, part], lse, *rest)

    dx, dy, _ = backward(slice(0, N))
    assert_close(torch.cat([backward(part)[0] for part in parts]), dx)
    assert_close(sum(backward(part)[1] for part in parts), dy)
