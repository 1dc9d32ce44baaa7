"""What the core takes as a tensor."""

import backends
import pytest
import torch

from mmkernels.runtime import native
from mmkernels.runtime.native import view


def pooled(x: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    out = torch.empty(len(cu_seqlens) - 1, 3)
    core = native.core
    core.launch_packing_segment_pool_fwd_cpu(view(x), view(cu_seqlens), core.PoolMode.sum, view(out), None, 1)
    return out


def test_a_vector_with_gaps_is_refused():
    """Kernels read vectors by their pointers alone: others would be read as something else, or past their end."""
    backends.need("packing", "native")
    x, cu_seqlens = torch.ones(4, 3), torch.tensor([0, 1, 4], dtype=torch.int32)
    expected = torch.tensor([[1.0], [3.0]]).expand(2, 3)
    assert torch.equal(pooled(x, cu_seqlens), expected)
    gaps = torch.stack([cu_seqlens, cu_seqlens], 1)[:, 0]
    with pytest.raises(ValueError, match="expected a contiguous last dimension, got stride 2 for size 3"):
        pooled(x, gaps)
    with pytest.raises(ValueError, match="expected a contiguous last dimension, got stride 0 for size 3"):
        pooled(x[:, :1].expand(4, 3), cu_seqlens)
    rows = torch.ones(4, 6)[:, :3]  # free are the other strides, and all of one element or none
    assert torch.equal(pooled(rows, cu_seqlens), expected)
    assert pooled(torch.ones(0, 3), gaps[:1]).shape == (0, 3)
    assert torch.equal(pooled(torch.ones(0, 3), torch.zeros_like(cu_seqlens)), 0 * expected)
