"""The hardness h of negatives, which the kernels know as a larger scale.

The logits are s a + h a', where a' is a without its gradient: those of the scale S = s + h, with the derivatives a by
s, as usual, and s by a rather than S. The kernels' backward multiplies the coefficient of the lse by S.

The softmax ops take s in float64, for its gradient, or in the statistics' dtype, in which the kernels get S.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.contrastive.types import LSE, MEAN
from mmkernels.ops.dtypes import compute_dtype

__all__ = ["as_unrounded", "harder_gradients", "harder_statistics"]


def harder_statistics(impls: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Forwards of the op from those of the backends, which know no hardness."""

    def with_hardness(statistics: Callable[..., Any]) -> Callable[..., Any]:
        def run(queries: Tensor, keys: Tensor, logit_scale: Tensor, *rules: Any) -> Any:
            *which, hardness, totals, columns = rules
            scale = _harder(logit_scale, hardness, queries)
            return statistics(queries, keys, scale, *which, totals, columns)

        return run

    return {backend: with_hardness(statistics) for backend, statistics in impls.items()}


def harder_gradients(impls: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Backwards likewise."""

    def with_hardness(gradients: Callable[..., Any]) -> Callable[..., Any]:
        def run(of_rows: Tensor, of_columns: Tensor, queries: Tensor, keys: Tensor, scale: Tensor, *rest: Any) -> Any:
            *which, hardness, need = rest
            harder = _harder(scale, hardness, queries)
            if hardness:
                share = scale.double() / harder
                of_rows, of_columns = (torch.cat([of[:1] * share, of[1:]]) for of in (of_rows, of_columns))
            return gradients(of_rows, of_columns, queries, keys, harder, *which, need)

        return run

    return {backend: with_hardness(gradients) for backend, gradients in impls.items()}


def _harder(scale: Tensor, hardness: float, queries: Tensor) -> Tensor:
    """S in the statistics' dtype, rounded."""
    scale = scale.to(compute_dtype(queries.dtype))
    return scale + hardness if hardness else scale


def as_unrounded(line: Tensor, scale: Tensor, hardness: float, queries: Tensor) -> Tensor:
    """The lse [N] of a line of statistics as if S had not been rounded, by the derivative of the lse, which is MEAN.

    One rounding moves the logits of all rows the same way, and a mean over rows keeps it: the loss would have up to 4
    times the error of plain PyTorch's. The backward of `line` still gets the lse of the rounded S, as it must.
    """
    if not hardness:
        return line[LSE]
    scale = scale.detach().double()
    lost = scale + hardness - _harder(scale, hardness, queries)
    return line[LSE] + lost * line[MEAN].detach()
