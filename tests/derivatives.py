"""Second derivatives against finite differences, in every order of forward and reverse mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

__all__ = ["assert_differentiable_twice"]


def assert_differentiable_twice(function: Callable[..., Any], *inputs: Tensor, fast_mode: bool = True) -> None:
    """`function` takes float64 tensors that require a gradient."""
    assert gradcheck(function, inputs, check_forward_ad=True, fast_mode=fast_mode)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, fast_mode=fast_mode)
    generator = torch.Generator().manual_seed(0)
    tangents = [torch.randn(x.shape, generator=generator, dtype=x.dtype).requires_grad_() for x in inputs]

    def moved(*both: Tensor) -> Any:
        return torch.func.jvp(function, both[: len(inputs)], both[len(inputs) :])[1]

    assert gradcheck(moved, (*inputs, *tangents), fast_mode=fast_mode)
