"""Segments to pool, and helpers that several test files share."""

from collections.abc import Callable

import torch
from torch import Tensor

MODES = ("sum", "mean", "max", "first")
# (lengths, rows left over)
SEGMENTS = {
    # Empty first, middle and last segments, single rows, one row more than a chunk of 64.
    "ragged": ([0, 3, 1, 0, 0, 17, 64, 65, 0], 0),
    "rows left over": ([2, 130], 5),
    # More than one chunk of the CPU kernel.
    "long": ([1, 2100, 0, 1024, 3], 2),
    "one": ([7], 0),
    "all empty": ([0, 0], 4),
    "none": ([], 3),
    "no rows": ([0, 0], 0),
}


def with_gradients(function: Callable[..., Tensor], grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """(output, gradient of each input)."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))
