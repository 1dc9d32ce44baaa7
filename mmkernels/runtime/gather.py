"""all_gather into one tensor, under the name that this torch has for it."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from mmkernels.runtime.received import count

__all__ = ["gather_into"]


def gather_into(out: Tensor, mine: Tensor, group: Any, *, wait: bool = True) -> Any:
    """Fill `out` with `mine` of every rank, in rank order; without `wait`, returns the work to wait for."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name up to torch 2.12
    count(out.nbytes - mine.nbytes)
    return gather(out, mine, group=group, async_op=not wait)
