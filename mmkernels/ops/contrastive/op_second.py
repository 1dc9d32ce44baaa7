"""Registration of the losses' second derivatives, which also implement forward mode; second.py has the maths.

Each takes a tangent per output of a backward op, then that op's arguments; incoming gradients may be None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.contrastive import second
from mmkernels.ops.contrastive.types import COEFFICIENTS
from mmkernels.ops.dtypes import compute_dtype
from mmkernels.runtime.register import Second

__all__ = ["infonce_second", "siglip_second", "sigmoid_second", "softmax_second"]

_SOFTMAX_INPUTS = "queries", "keys", "logit_scale"
_SIGMOID_INPUTS = *_SOFTMAX_INPUTS, "logit_bias"


def _second(
    run: Callable[..., tuple[Tensor, ...]],
    grads: tuple[str, ...],
    inputs: tuple[str, ...],
    fake: Callable[..., tuple[Tensor, ...]],
    products: tuple[int, int],
) -> Second:
    """Args:
    run: the function of second.py.
    grads, inputs: names of the backward op's first arguments.
    fake: of the backward op's arguments after the grads; allocates tangents of the forward's outputs.
    products: N x M products for the tangents of the forward's outputs, and for those of a gradient.
    """

    def split(args: tuple[Any, ...]) -> tuple[Tensor | None, tuple[Any, ...]]:
        """One of the incoming gradients, and the arguments after them."""
        return args[len(inputs)], args[len(inputs) + len(grads) :]

    def room(*args: Any) -> tuple[Tensor, ...]:
        grad, given = split(args)
        return *fake(*given), *(x.new_empty(0 if grad is None else x.shape) for x in given[: len(inputs)])

    def flops(*args: Any) -> int:
        grad, (queries, keys, *_) = split(args)
        count = products[0] if grad is None else sum(products)
        return 2 * queries.shape[0] * keys.shape[0] * queries.shape[1] * count

    return Second(run, room, grads, inputs, flops)


def _statistics(
    queries: Tensor, keys: Tensor, logit_scale: Tensor, lse_q: Tensor, lse_k: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(COEFFICIENTS, x.shape[0], dtype=torch.float64) for x in (lse_q, lse_k))


def _loss(queries: Tensor, *_: Any) -> tuple[Tensor]:
    return (queries.new_empty((), dtype=compute_dtype(queries.dtype)),)


def _sum(queries: Tensor, *_: Any) -> tuple[Tensor]:
    return (queries.new_empty((), dtype=torch.float64),)


# Similarities and their tangents are three products. A softmax computes them for its lse (without tangents), for the
# lse's tangents and for a gradient; a sigmoid once for all. A gradient's tangents are four more.
softmax_second = _second(
    second.softmax_second, ("coefficients_q", "coefficients_k"), _SOFTMAX_INPUTS, _statistics, products=(1 + 3, 3 + 4)
)
infonce_second = _second(second.infonce_second, ("grad_loss",), _SOFTMAX_INPUTS, _loss, products=(1 + 3, 3 + 4))
sigmoid_second = _second(second.sigmoid_second, ("grad_sum",), _SIGMOID_INPUTS, _sum, products=(3, 4))
siglip_second = _second(second.siglip_second, ("grad_loss",), _SIGMOID_INPUTS, _loss, products=(3, 4))
