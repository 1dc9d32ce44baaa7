"""Queries that see the keys of another sample, in no order: one tile of queries then sees few keys of many tiles."""

import backends
import pytest
import torch

from mmkernels import AttentionMask
from mmkernels.testing import assert_as_accurate
from mmkernels.testing.attention import AttentionInputs, plain, run


def partners(samples: int, keys_each: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(lo, hi) of the queries of 2 x `samples` texts, each with a partner among `samples` images; the number of keys."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 16, (2 * samples,), generator=random)
    partner = torch.cat([torch.randperm(samples, generator=random) for _ in range(2)]).repeat_interleave(lengths)
    cu_seqlens = torch.arange(samples + 1, dtype=torch.int32) * keys_each
    return cu_seqlens[partner], cu_seqlens[partner + 1], samples * keys_each


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keys_each", [1, 7, 36, 100])
def test_gradients(keys_each: int, dtype: torch.dtype) -> None:
    backends.need("attention", "native", dtype)
    for seed in range(3):
        lo, hi, keys = partners(48, keys_each, seed)
        random = torch.Generator().manual_seed(seed)
        q, k, v, grad_out = (torch.randn(n, 2, 32, generator=random).to(dtype) for n in (len(lo), keys, keys, len(lo)))
        inputs = AttentionInputs(q, k, v, grad_out, torch.zeros(2, len(lo)), AttentionMask.from_rows(lo, hi))
        three = run(inputs, "native"), plain(inputs), plain(inputs.to(torch.float64))
        for name in ("dq", "dk", "dv"):
            assert_as_accurate(f"{keys_each} keys, seed {seed}: {name}", *(getattr(one, name) for one in three))
