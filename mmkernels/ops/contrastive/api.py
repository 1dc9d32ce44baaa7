"""The contrastive losses: documentation, validation, routing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.ops._checks import expect_tensor, not_yet, wrong_type, wrong_value
from mmkernels.runtime.backends import resolve

from . import op
from .reference import statistics_dtype

__all__ = ["infonce", "siglip"]


def infonce(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor | float,
    *,
    targets: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    same_id: str = "positive",
    negatives: Tensor | None = None,
    label_smoothing: float = 0.0,
    symmetric: bool = True,
    weights: Tensor | None = None,
    teacher: tuple[Tensor, Tensor, float] | None = None,
    group: Any = None,
    exchange: str = "auto",
    return_stats: bool = False,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """Symmetric InfoNCE (the CLIP loss) in O((N+M)·E) memory: the logits are never stored.

    With `s_ij = logit_scale · <x_i, y_j>`::

        loss = 1/2N · sum_i [log sum_j exp(s_ij) - s_ii] + [log sum_j exp(s_ji) - s_ii]

    Nothing is normalised inside. Features are used in the dtype they have, autocast or not; products accumulate in
    float32 (float64 for float64 features), where the loss and the statistics live too.

    Args:
        queries: [N, E] float32, bfloat16, float16 or float64; row i belongs to key i.
        keys: [N, E], same dtype and device.
        logit_scale: what multiplies the similarities (already exponentiated): a number, or a tensor of one element of
            any floating dtype, which gets its exact gradient.
        targets, query_ids, key_ids, same_id, negatives, label_smoothing, symmetric, weights, teacher, group, exchange,
            return_stats: not supported yet; anything but the default raises NotImplementedError.
        deterministic: every backend gives the same bits for the same input and machine, whatever is asked here; on CPU
            for any number of threads.
        backend: None for the fastest one that can serve, or "native", "triton", "reference".

    Returns:
        the loss, a scalar in float32 (float64 for float64 features), differentiable with respect to queries, keys and
        logit_scale. The loss of no rows at all is 0, with zero gradients (`F.cross_entropy` gives NaN there), so that a
        rank without samples does not poison a mean.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        NotImplementedError: an argument that is not supported yet.
        mmkernels.BackendError: `backend` cannot serve this call.

    Source: van den Oord et al. 2018 (arXiv:1807.03748); Radford et al. 2021 (arXiv:2103.00020).
    """
    _refuse(targets=targets, query_ids=query_ids, key_ids=key_ids, negatives=negatives, weights=weights)
    _refuse(teacher=teacher, group=group)
    _refuse_all_but(same_id=(same_id, "positive"), label_smoothing=(label_smoothing, 0.0))
    _refuse_all_but(symmetric=(symmetric, True), exchange=(exchange, "auto"), return_stats=(return_stats, False))
    _check_deterministic(deterministic)
    _check_features(queries, keys)
    scale = _scalar("logit_scale", logit_scale, queries)
    return op.infonce_fwd(queries, keys, scale, resolve("contrastive", queries, backend))[0]


def siglip(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    group: Any = None,
    exchange: str = "auto",
    return_stats: bool = False,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """The pairwise sigmoid loss of SigLIP in O((N+M)·E) memory: the logits are never stored.

    ::

        loss = -1/N · sum_ij log sigmoid(z_ij · (logit_scale · <x_i, y_j> + logit_bias)),  z_ij = +1 if i == j else -1

    Nothing is normalised inside. Features are used in the dtype they have, autocast or not; products accumulate in
    float32 (float64 for float64 features), where the loss lives too.

    Args:
        queries: [N, E] float32, bfloat16, float16 or float64; row i belongs to key i.
        keys: [N, E], same dtype and device.
        logit_scale: what multiplies the similarities: a number, or a tensor of one element of any floating dtype, which
            gets its exact gradient.
        logit_bias: what is added to the logits; likewise.
        query_ids, key_ids, group, exchange, return_stats: not supported yet; anything but the default raises
            NotImplementedError.
        deterministic: every backend gives the same bits for the same input and machine, whatever is asked here; on CPU
            for any number of threads.
        backend: None for the fastest one that can serve, or "native", "triton", "reference".

    Returns:
        the loss, a scalar in float32 (float64 for float64 features), differentiable with respect to queries, keys,
        logit_scale and logit_bias. The loss of no rows at all is 0, with zero gradients.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        NotImplementedError: an argument that is not supported yet.
        mmkernels.BackendError: `backend` cannot serve this call.

    Source: Zhai et al. 2023 (arXiv:2303.15343).
    """
    _refuse(query_ids=query_ids, key_ids=key_ids, group=group)
    _refuse_all_but(exchange=(exchange, "auto"), return_stats=(return_stats, False))
    _check_deterministic(deterministic)
    _check_features(queries, keys)
    scale, bias = _scalar("logit_scale", logit_scale, queries), _scalar("logit_bias", logit_bias, queries)
    return op.siglip_fwd(queries, keys, scale, bias, resolve("contrastive", queries, backend))[0]


def _refuse(**arguments: Any) -> None:
    """For arguments that default to None."""
    for name, value in arguments.items():
        if value is not None:
            not_yet(name, value)


def _refuse_all_but(**arguments: tuple[Any, Any]) -> None:
    """For (value, default) pairs."""
    for name, (value, default) in arguments.items():
        if type(value) is not type(default) or value != default:
            not_yet(name, value)


def _check_deterministic(deterministic: Any) -> None:
    if deterministic is not None and not isinstance(deterministic, bool):
        wrong_type("deterministic", "None, True or False", deterministic)


def _check_features(queries: Any, keys: Any) -> None:
    expect_tensor("queries", queries, "[N, E] floating point", ndim=2)
    expect_tensor("keys", keys, "[N, E] floating point", ndim=2, like=queries)
    if keys.dtype != queries.dtype:
        wrong_type("keys", f"{str(queries.dtype).removeprefix('torch.')} like queries", keys)
    if keys.shape[1] != queries.shape[1]:
        wrong_value("keys", f"[N, {queries.shape[1]}], as wide as queries", keys)
    if keys.shape[0] != queries.shape[0]:
        wrong_value("keys", f"[{queries.shape[0]}, E], one for each query (more keys: not supported yet)", keys)


def _scalar(name: str, value: Any, queries: Tensor) -> Tensor:
    """A number or a tensor of one element as a [] tensor in the type of the statistics; differentiable."""
    expected = "a number or a floating-point tensor of one element"
    dtype = statistics_dtype(queries.dtype)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.full((), value, dtype=dtype, device=queries.device)
    expect_tensor(name, value, expected, ndim=(0, 1), like=queries)
    if value.numel() != 1:
        wrong_value(name, expected, value)
    return value.to(dtype).reshape(())
