"""The ops of the losses' second derivatives and forward mode: schema and fake; second.py has the mathematics.

Each takes a tangent for every output of a backward op, then that op's arguments, whose incoming gradients may be None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.contrastive import second
from mmkernels.ops.contrastive.reference import COEFFICIENTS, Pairs, Teacher, statistics_dtype
from mmkernels.runtime.backends import BACKENDS
from mmkernels.runtime.legacy_register import Op

__all__ = ["PAIRS", "TEACHER", "infonce_second", "siglip_second", "sigmoid_second", "softmax_second"]

PAIRS = "Tensor? targets, Tensor? query_ids, Tensor? key_ids"
TEACHER = "Tensor? teacher_queries, Tensor? teacher_keys, Tensor? teacher_lse_q, Tensor? teacher_lse_k"
_FEATURES = "Tensor? tangent_queries, Tensor? tangent_keys, Tensor? tangent_scale"
_INPUTS = "Tensor queries, Tensor keys, Tensor logit_scale"
_NEEDS = "bool need_queries, bool need_keys, str backend"


def _tangents_fake(grad: Tensor | None, *inputs: Tensor) -> list[Tensor]:
    """Of the gradients of these inputs; empty if there is no incoming gradient."""
    return [x.new_empty(0 if grad is None else x.shape) for x in inputs]


def _flat(run: Callable[..., tuple[Tensor, ...]], tensors: int, pairs: slice | None = None) -> Callable[..., Any]:
    """A function of second.py, which takes so many tensors and the pairs' rule, over an op's arguments."""
    return lambda *args: run(*args[:tensors], *([] if pairs is None else [Pairs(*args[pairs])]))


def _flat_softmax(run: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    def flat(*args: Any) -> tuple[Tensor, ...]:
        teacher = None if args[14] is None else Teacher(*args[14:18])
        columns = args[9].shape[0]  # none, or one for each key
        return run(*args[:8], columns, Pairs(*args[10:14]), teacher)

    return flat


def _softmax_fake(tq: Any, tk: Any, ts: Any, of_q: Tensor | None, of_k: Any, *args: Any) -> tuple[Tensor, ...]:
    queries, keys, logit_scale, *lse = args[:5]
    statistics = (x.new_empty(COEFFICIENTS, x.shape[0], dtype=torch.float64) for x in lse)
    return *statistics, *_tangents_fake(of_q, queries, keys, logit_scale)


def _infonce_fake(tq: Any, tk: Any, ts: Any, grad_loss: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    moved = args[0].new_empty((), dtype=statistics_dtype(args[0].dtype))
    return moved, *_tangents_fake(grad_loss, *args[:3])


def _sigmoid_fake(tq: Any, tk: Any, ts: Any, tb: Any, grad: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    return args[0].new_empty((), dtype=torch.float64), *_tangents_fake(grad, *args[:4])


def _siglip_fake(tq: Any, tk: Any, ts: Any, tb: Any, grad: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    moved = args[0].new_empty((), dtype=statistics_dtype(args[0].dtype))
    return moved, *_tangents_fake(grad, *args[:4])


def _flops(grad: int, features: int, softmax: bool) -> Callable[..., int]:
    """Similarities and their tangents once a pass: for the lse, for its tangents, and for a gradient, which is four
    products more. The places of the incoming gradient and of the features."""

    def count(*args: Any) -> int:
        queries, keys = args[features : features + 2]
        products = (1 + 3) * softmax + (0 if args[grad] is None and softmax else 3)
        products += 0 if args[grad] is None else 4
        return 2 * queries.shape[0] * keys.shape[0] * queries.shape[1] * products

    return count


softmax_second = Op(
    "contrastive_softmax_second",
    f"({_FEATURES}, Tensor? coefficients_q, Tensor? coefficients_k, {_INPUTS}, Tensor lse_q, Tensor lse_k, {PAIRS}, "
    f"str same_id, {TEACHER}, Tensor? mean_q, Tensor? mean_k, {_NEEDS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    impls=dict.fromkeys(BACKENDS, _flat_softmax(second.softmax_second)),
    fake=_softmax_fake,
    flops=_flops(3, 5, softmax=True),
)

sigmoid_second = Op(
    "contrastive_sigmoid_second",
    f"({_FEATURES}, Tensor? tangent_bias, Tensor? grad_sum, {_INPUTS}, Tensor logit_bias, {PAIRS}, Tensor? sums, "
    f"{_NEEDS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    impls=dict.fromkeys(BACKENDS, _flat(second.sigmoid_second, 9, slice(9, 12))),
    fake=_sigmoid_fake,
    flops=_flops(4, 5, softmax=False),
)

infonce_second = Op(
    "contrastive_infonce_second",
    f"({_FEATURES}, Tensor? grad_loss, {_INPUTS}, Tensor lse_q, Tensor lse_k, Tensor grad_scale, {_NEEDS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    impls=dict.fromkeys(BACKENDS, _flat(second.infonce_second, 7)),
    fake=_infonce_fake,
    flops=_flops(3, 4, softmax=True),
)

siglip_second = Op(
    "contrastive_siglip_second",
    f"({_FEATURES}, Tensor? tangent_bias, Tensor? grad_loss, {_INPUTS}, Tensor logit_bias, Tensor grad_scale, "
    f"Tensor grad_bias, {_NEEDS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    impls=dict.fromkeys(BACKENDS, _flat(second.siglip_second, 9)),
    fake=_siglip_fake,
    flops=_flops(4, 5, softmax=False),
)
