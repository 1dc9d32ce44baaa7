"""Targets of a `PackedBatch` and their weights; sums are in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.batch.fields import IGNORE_LABEL, PackedFields
from mmkernels.ops.checks import expect_tensor, wrong_value
from mmkernels.ops.packing import segment_pool

__all__ = ["firsts", "next_labels", "target_weights", "totals", "weights"]


def firsts(batch: PackedFields) -> Tensor:
    """[T] bool: whether a token is its segment's first."""
    at = batch.sample_ids.new_zeros(batch.num_tokens + 1, dtype=torch.bool)
    return at.index_fill(0, batch.cu_seqlens.long(), True)[:-1]


def next_labels(batch: PackedFields) -> Tensor:
    """See `PackedBatch.next_labels`."""
    if batch.labels is None:
        wrong_value("labels", "[T] int64", None)
    own = torch.where(firsts(batch), IGNORE_LABEL, batch.labels)
    return torch.cat([own[1:], own.new_full((min(1, len(own)),), IGNORE_LABEL)])


def _owner(batch: PackedFields) -> Tensor:
    """[T]: the index of each token's sample; S in padding."""
    at = torch.arange(batch.num_tokens, device=batch.cu_seqlens.device, dtype=torch.int32)
    return torch.searchsorted(batch.cu_seqlens[1:].contiguous(), at, right=True)


def target_weights(batch: PackedFields, causal: bool = True, *, of_samples: bool = True) -> Tensor:
    """[T] float64: the weight of each token's label, 0 without a target; `of_samples` multiplies by its sample's."""
    real = torch.arange(batch.num_tokens, device=batch.tokens.device) < batch.num_tokens - batch.padding
    weight = real.double()
    if batch.loss_weight is not None:
        weight = weight * batch.loss_weight
    if batch.labels is not None:
        none = batch.labels == IGNORE_LABEL
        weight = torch.where(none | firsts(batch) if causal else none, 0, weight)
    if of_samples and batch.sample_weight is not None:
        weight = weight * _of_samples(batch)[_owner(batch)]
    return weight


def _of_samples(batch: PackedFields) -> Tensor:
    """[S + 1] float64: the samples' weights, then 0 for the padding."""
    weight = batch.sample_weight
    one = torch.ones(batch.num_samples, device=batch.tokens.device) if weight is None else weight
    return torch.nn.functional.pad(one.double(), (0, 1))


def _per_sample(batch: PackedFields, weight: Tensor) -> Tensor:
    """[T] -> [S + 1]: the sum over each sample, 0 for the padding."""
    cu = batch.cu_seqlens[: batch.num_samples + 1]
    return torch.nn.functional.pad(segment_pool(weight, cu, "sum"), (0, 1))


def totals(batch: PackedFields, causal: bool) -> Tensor:
    """See `PackedBatch.loss_totals`."""
    sums = _per_sample(batch, target_weights(batch, causal, of_samples=False))
    return torch.stack([target_weights(batch, causal).sum(), torch.where(sums > 0, _of_samples(batch), 0).sum()])


def weights(batch: PackedFields, normalize: str, total: Tensor | None, causal: bool) -> Tensor:
    """See `PackedBatch.loss_weights`."""
    if normalize not in ("token", "sample"):
        wrong_value("normalize", '"token" or "sample"', normalize)
    if total is None:
        total = totals(batch, causal)
    expect_tensor("totals", total, "[2] float64", ndim=1, dtypes=(torch.float64,), like=batch.tokens)
    if total.shape != (2,):
        wrong_value("totals", "[2] float64", total)
    weight = target_weights(batch, causal)
    if normalize == "sample":
        sums = _per_sample(batch, target_weights(batch, causal, of_samples=False))
        weight = weight / torch.where(sums > 0, sums, 1)[_owner(batch)]
    count = total[0 if normalize == "token" else 1]
    # A batch without targets gives 0, not NaN.
    return torch.where(count > 0, weight / torch.where(count > 0, count, 1), 0).float()
