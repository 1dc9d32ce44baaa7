"""Losses over a packed batch: weights, totals, shifted labels."""

import pytest
import torch
from batch.samples import text
from torch import Tensor

from mmkernels import PackedBatch


def lm_batch(lengths, seed=0, capacity=None, **options) -> PackedBatch:
    torch.manual_seed(seed)
    tokens = [torch.randint(0, 9, (n,)) for n in lengths]
    labels = [torch.where(torch.rand(n) < 0.3, -100, ids) for ids, n in zip(tokens, lengths, strict=True)]
    return PackedBatch.from_samples(tokens, labels=labels, capacity=capacity, **options)


def nll_of(batch: PackedBatch) -> Tensor:
    """[T] a loss of each token's label that depends on its sample only."""
    return (1 + batch.position_ids).sqrt() * (1 + batch.tokens)


def targets_by_hand(batch: PackedBatch) -> list[tuple[Tensor, Tensor]]:
    """For each sample, the losses of its targets and their weights."""
    nll, found = nll_of(batch), []
    for s, (begin, end) in enumerate(zip(batch.cu_seqlens_host, batch.cu_seqlens_host[1:], strict=False)):
        if s < batch.num_samples:
            at = [t for t in range(begin + 1, end) if batch.labels[t] != -100]
            weight = torch.ones(len(at)) if batch.loss_weight is None else batch.loss_weight[at]
            found.append((nll[at], weight))
    return found


@pytest.mark.parametrize("weighted", [False, True])
def test_loss_normalised_per_sample_against_per_token(weighted):
    """unsloth #1216: the two normalisations differ, each is what its name says, and neither depends on the packing."""
    lengths = [5, 30, 1, 12, 0, 7]
    options = {}
    if weighted:
        options = {"loss_weight": [torch.rand(n) for n in lengths], "sample_weight": [1.0, 2.0, 3.0, 0.5, 1.0, 0.0]}
    batch = lm_batch(lengths, capacity=64, **options)
    of_samples = torch.ones(6) if not weighted else torch.tensor(options["sample_weight"])
    by_hand = targets_by_hand(batch)
    has_any = [s for s, (_, w) in enumerate(by_hand) if w.sum() > 0]
    terms = [of_samples[s] * (by_hand[s][0] * by_hand[s][1]).sum() for s in has_any]
    sums = [of_samples[s] * by_hand[s][1].sum() for s in has_any]
    per_token = sum(terms) / sum(sums)
    per_sample = sum(t / by_hand[s][1].sum() for s, t in zip(has_any, terms, strict=True)) / of_samples[has_any].sum()
    nll = nll_of(batch)
    assert not torch.isclose(per_token, per_sample)
    torch.testing.assert_close((batch.loss_weights("token") * nll).sum(), per_token)
    torch.testing.assert_close((batch.loss_weights("sample") * nll).sum(), per_sample)
    # Packed differently, in micro-batches or on ranks: the parts add up to the same loss.
    for size in (1, 2, 4):
        chunks = batch.split(size)
        totals = sum(chunk.loss_totals() for chunk in chunks)
        torch.testing.assert_close(totals, batch.loss_totals())
        for normalize, expected in (("token", per_token), ("sample", per_sample)):
            parts = [(chunk.loss_weights(normalize, totals) * nll_of(chunk)).sum() for chunk in chunks]
            torch.testing.assert_close(sum(parts), expected)


def test_loss_totals_count_exactly():
    batch = lm_batch([5, 30, 1, 12, 0, 7], capacity=70)
    targets = batch.next_labels() != -100
    assert batch.loss_totals().tolist() == [int(targets.sum()), sum(len(w) > 0 for _, w in targets_by_hand(batch))]
    assert batch.loss_totals().dtype == torch.float64
    assert torch.equal(batch.loss_weights("token").roll(-1) > 0, targets)
    in_place = batch.loss_weights("token", causal=False) > 0  # masked modelling: first labels count too
    assert torch.equal(in_place, batch.labels != -100)
    assert batch.loss_totals(causal=False)[0] == int((batch.labels != -100).sum())
    nothing = PackedBatch.from_samples([torch.arange(1)], labels=[torch.arange(1)], capacity=3)
    assert nothing.loss_weights("token").tolist() == nothing.loss_weights("sample").tolist() == [0, 0, 0]
    unlabelled = PackedBatch.from_samples([torch.arange(2), torch.arange(1)], capacity=4)
    assert unlabelled.loss_weights("token").tolist() == pytest.approx([1 / 3] * 3 + [0])
    assert unlabelled.loss_weights("sample").tolist() == pytest.approx([1 / 4, 1 / 4, 1 / 2, 0])
    with pytest.raises(ValueError, match='normalize: expected "token" or "sample", got'):
        batch.loss_weights("mean")
    with pytest.raises(TypeError, match=r"totals: expected \[2\] float64"):
        batch.loss_weights("token", torch.ones(2))
    with pytest.raises(ValueError, match="labels: expected"):
        unlabelled.next_labels()


def test_next_labels_stay_in_their_sample():
    batch = PackedBatch.from_samples(
        [text(1, 2, 3), text(4), text(5, 6)], capacity=8, labels=[text(1, 2, 3), text(4), text(5, 6)]
    )
    assert batch.next_labels().tolist() == [2, 3, -100, -100, 6, -100, -100, -100]
