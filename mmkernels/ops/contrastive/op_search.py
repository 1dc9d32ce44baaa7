"""The retrieval ops; no gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.contrastive import native, reference
from mmkernels.ops.contrastive.op import expect_no_ignored, forward_flops
from mmkernels.ops.contrastive.types import Pairs
from mmkernels.ops.dtypes import compute_dtype
from mmkernels.runtime.register import Op, on_triton

__all__ = ["sample_negatives", "topk_similar"]


def _sample_fake(queries: Tensor, keys: Tensor, logit_scale: Tensor, seed: Tensor, pairs: Pairs) -> Tensor:
    return queries.new_empty(queries.shape[0], dtype=torch.int64)


def _topk_fake(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values = queries.new_empty(queries.shape[0], k, dtype=compute_dtype(queries.dtype))
    return values, values.new_empty(values.shape, dtype=torch.int64)


sample_negatives = Op(
    "contrastive_sample_fwd",
    fake=_sample_fake,
    impls={
        "native": native.sample_negatives,
        "triton": on_triton("mmkernels.ops.contrastive.triton_search", "sample_negatives"),
        "reference": reference.sample_negatives,
    },
    check=expect_no_ignored,
    flops=forward_flops,
)

topk_similar = Op(
    "contrastive_topk_fwd",
    fake=_topk_fake,
    impls={
        "native": native.topk_similar,
        "triton": on_triton("mmkernels.ops.contrastive.triton_search", "topk_similar"),
        "reference": reference.topk_similar,
    },
    flops=forward_flops,
)
