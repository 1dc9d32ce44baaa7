"""The contrastive ops: schema, fake, what is saved, backward.

    softmax_fwd/_bwd    statistics of rows and columns of the logits, and the gradient of any function of them: every
                        InfoNCE there is, a part of a distributed one too
    sigmoid_fwd/_bwd    the sum of all pairs' sigmoid losses
    infonce, siglip     their plain cases in one op, which the CUDA C++ kernels know
    sample, topk        retrieval; no gradient

Forwards also give the gradients of the scalars (they come free from the statistics), so that a backward op only makes
the feature gradients, by recomputing the logits. What goes from one to the other is the lse of every row and column, in
float64: rounded to float32 it would put an error of half its last place into every softmax. A feature gradient nobody
needs is not computed: it comes as [0, E].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmkernels.runtime.register import Op

from . import chunks, native, reference
from .reference import COEFFICIENTS, LSE, MEAN, STATISTICS, Pairs, Teacher, statistics_dtype

__all__ = [
    "infonce_bwd",
    "infonce_fwd",
    "sample_negatives",
    "siglip_bwd",
    "siglip_fwd",
    "sigmoid_bwd",
    "sigmoid_fwd",
    "softmax_bwd",
    "softmax_fwd",
    "topk_similar",
]


def _triton(module: str, name: str) -> Callable[..., Any]:
    """A Triton launcher, imported when it is first called: triton is optional."""

    def launch(*args: Any) -> Any:
        from . import triton_bwd, triton_fwd

        device = args[0].device
        with torch.cuda.device(device if device.type == "cuda" else -1):
            return getattr({"fwd": triton_fwd, "bwd": triton_bwd}[module], name)(*args)

    return launch


def _grouped(run: Callable[..., Any], tensors: int, teacher: bool = False) -> Callable[..., Any]:
    """A backend's function, which takes Pairs (and Teacher) after so many tensors, as one of the op's flat ones."""

    def launch(*args: Any) -> Any:
        first, rest = args[:tensors], args[tensors:]
        if not teacher:
            return run(*first, Pairs(*rest[:3]), *rest[3:])
        return run(*first, Pairs(*rest[:4]), None if rest[4] is None else Teacher(*rest[4:8]), *rest[8:])

    return launch


def _impls(name: str, direction: str, tensors: int, teacher: bool = False, oracle: Any = chunks) -> dict[str, Any]:
    runs = {"native": getattr(native, name), "triton": _triton(direction, name), "reference": getattr(oracle, name)}
    return {backend: _grouped(run, tensors, teacher) for backend, run in runs.items()}


def _fake_scalars(queries: Tensor, count: int) -> tuple[Tensor, ...]:
    return tuple(queries.new_empty((), dtype=statistics_dtype(queries.dtype)) for _ in range(count))


def _fake_gradients(queries: Tensor, keys: Tensor, need_queries: bool, need_keys: bool) -> tuple[Tensor, Tensor]:
    rows = queries.shape[0] if need_queries else 0, keys.shape[0] if need_keys else 0
    return queries.new_empty(rows[0], queries.shape[1]), keys.new_empty(rows[1], keys.shape[1])


# Softmax statistics. Rows of the statistics, float64 [7, N] and [7, M] (reference.LSE, POSITIVE, ...):
#   0 lse of the logits seen        2 sum of the similarities seen, if totals    4 mean similarity under the softmax
#   1 sum of positive similarities  3 the teacher's mean similarity              5, 6 largest logit seen, and positive
# The first four are differentiable. Which pairs are positive: same_id "positive" and ids: those of the same id; else
# targets [N], the one key of each query (or -1: none here). With same_id "ignore" pairs of the same id that are not
# positive are not seen. A row that sees nothing has lse = -inf. columns=False leaves the columns' out ([7, 0]).


def _softmax_fwd_fake(queries: Tensor, keys: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    columns = args[-2]
    return (
        queries.new_empty(STATISTICS, queries.shape[0], dtype=torch.float64),
        keys.new_empty(STATISTICS, keys.shape[0] if columns else 0, dtype=torch.float64),
    )


def _softmax_bwd_fake(coefficients_q: Tensor, coefficients_k: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    queries, keys, *_, need_queries, need_keys, _backend = args
    return _fake_gradients(queries, keys, need_queries, need_keys)


def _softmax_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    queries, keys, logit_scale, targets, query_ids, key_ids, ctx.same_id, *teacher, _, _, ctx.backend = inputs
    ctx.save_for_backward(queries, keys, logit_scale, targets, query_ids, key_ids, *teacher, *output)


def _softmax_backward(ctx: Any, grad_rows: Tensor, grad_columns: Tensor) -> tuple[Any, ...]:
    queries, keys, logit_scale, targets, query_ids, key_ids, *teacher, of_rows, of_columns = ctx.saved_tensors
    need_queries, need_keys, need_scale = ctx.needs_input_grad[:3]
    dqueries = dkeys = dscale = None
    if need_queries or need_keys:
        coefficients = grad_rows[:COEFFICIENTS], grad_columns[:COEFFICIENTS]
        lse, pairs = (of_rows[LSE], of_columns[LSE]), (targets, query_ids, key_ids, ctx.same_id)
        dqueries, dkeys = softmax_bwd(
            *coefficients, queries, keys, logit_scale, *lse, *pairs, *teacher, need_queries, need_keys, ctx.backend
        )
    if need_scale:
        # An lse of nothing is constant; its mean is 0.
        parts = (grad_rows[LSE] * of_rows[MEAN]).sum() + (grad_columns[LSE] * of_columns[MEAN]).sum()
        dscale = parts.to(logit_scale.dtype)
    return (dqueries if need_queries else None, dkeys if need_keys else None, dscale, *(None,) * 11)


_PAIRS = "Tensor? targets, Tensor? query_ids, Tensor? key_ids"
_TEACHER = "Tensor? teacher_queries, Tensor? teacher_keys, Tensor? teacher_lse_q, Tensor? teacher_lse_k"

softmax_bwd = Op(
    "contrastive_softmax_bwd",
    "(Tensor coefficients_q, Tensor coefficients_k, Tensor queries, Tensor keys, Tensor logit_scale, Tensor lse_q, "
    f"Tensor lse_k, {_PAIRS}, str same_id, {_TEACHER}, bool need_queries, bool need_keys, str backend) "
    "-> (Tensor dqueries, Tensor dkeys)",
    impls=_impls("softmax_bwd", "bwd", 7, teacher=True),
    fake=_softmax_bwd_fake,
)

softmax_fwd = Op(
    "contrastive_softmax_fwd",
    f"(Tensor queries, Tensor keys, Tensor logit_scale, {_PAIRS}, str same_id, {_TEACHER}, bool totals, bool columns, "
    "str backend) -> (Tensor rows, Tensor columns)",
    impls=_impls("softmax_fwd", "fwd", 3, teacher=True),
    fake=_softmax_fwd_fake,
    setup_context=_softmax_setup,
    backward=_softmax_backward,
)


# Sigmoid: [3] float64, the sum of all pairs' losses and its derivatives by scale and bias. The first is differentiable.


def _sigmoid_fwd_fake(queries: Tensor, *args: Any) -> Tensor:
    return queries.new_empty(3, dtype=torch.float64)


def _sigmoid_bwd_fake(grad_sum: Tensor, queries: Tensor, keys: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _fake_gradients(queries, keys, *args[-3:-1])


def _sigmoid_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output)


def _sigmoid_backward(ctx: Any, grad_sums: Tensor) -> tuple[Any, ...]:
    *inputs, sums = ctx.saved_tensors
    need_queries, need_keys, need_scale, need_bias = ctx.needs_input_grad[:4]
    grad = grad_sums[0]
    dqueries = dkeys = None
    if need_queries or need_keys:
        dqueries, dkeys = sigmoid_bwd(grad, *inputs, need_queries, need_keys, ctx.backend)
    return (
        dqueries if need_queries else None,
        dkeys if need_keys else None,
        (grad * sums[1]).to(inputs[2].dtype) if need_scale else None,
        (grad * sums[2]).to(inputs[3].dtype) if need_bias else None,
        *(None,) * 4,
    )


sigmoid_bwd = Op(
    "contrastive_sigmoid_bwd",
    f"(Tensor grad_sum, Tensor queries, Tensor keys, Tensor logit_scale, Tensor logit_bias, {_PAIRS}, "
    "bool need_queries, bool need_keys, str backend) -> (Tensor dqueries, Tensor dkeys)",
    impls=_impls("sigmoid_bwd", "bwd", 5),
    fake=_sigmoid_bwd_fake,
)

sigmoid_fwd = Op(
    "contrastive_sigmoid_fwd",
    f"(Tensor queries, Tensor keys, Tensor logit_scale, Tensor logit_bias, {_PAIRS}, str backend) -> Tensor",
    impls=_impls("sigmoid_fwd", "fwd", 4),
    fake=_sigmoid_fwd_fake,
    setup_context=_sigmoid_setup,
    backward=_sigmoid_backward,
)


# The plain losses


def _infonce_fwd_fake(queries: Tensor, keys: Tensor, logit_scale: Tensor, backend: str) -> tuple[Tensor, ...]:
    loss, grad_scale = _fake_scalars(queries, 2)
    lse = [x.new_empty(x.shape[0], dtype=torch.float64) for x in (queries, keys)]
    return loss, *lse, grad_scale


def _plain_bwd_fake(grad_loss: Tensor, queries: Tensor, keys: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _fake_gradients(queries, keys, *args[-3:-1])


def _infonce_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    queries, keys, logit_scale, ctx.backend = inputs
    _, lse_q, lse_k, grad_scale = output
    ctx.mark_non_differentiable(lse_q, lse_k, grad_scale)
    ctx.save_for_backward(queries, keys, logit_scale, lse_q, lse_k, grad_scale)


def _infonce_backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    queries, keys, logit_scale, lse_q, lse_k, grad_scale = ctx.saved_tensors
    need_queries, need_keys, need_scale, _ = ctx.needs_input_grad
    dqueries = dkeys = None
    if need_queries or need_keys:
        dqueries, dkeys = infonce_bwd(
            grad_loss, queries, keys, logit_scale, lse_q, lse_k, need_queries, need_keys, ctx.backend
        )
    return (
        dqueries if need_queries else None,
        dkeys if need_keys else None,
        grad_loss * grad_scale if need_scale else None,
        None,
    )


infonce_bwd = Op(
    "contrastive_infonce_bwd",
    "(Tensor grad_loss, Tensor queries, Tensor keys, Tensor logit_scale, Tensor lse_q, Tensor lse_k, "
    "bool need_queries, bool need_keys, str backend) -> (Tensor dqueries, Tensor dkeys)",
    impls={"native": native.infonce_bwd, "triton": _triton("bwd", "infonce_bwd"), "reference": reference.infonce_bwd},
    fake=_plain_bwd_fake,
)

infonce_fwd = Op(
    "contrastive_infonce_fwd",
    "(Tensor queries, Tensor keys, Tensor logit_scale, str backend) "
    "-> (Tensor loss, Tensor lse_q, Tensor lse_k, Tensor grad_scale)",
    impls={"native": native.infonce_fwd, "triton": _triton("fwd", "infonce_fwd"), "reference": reference.infonce_fwd},
    fake=_infonce_fwd_fake,
    setup_context=_infonce_setup,
    backward=_infonce_backward,
)


def _siglip_fwd_fake(
    queries: Tensor, keys: Tensor, logit_scale: Tensor, logit_bias: Tensor, backend: str
) -> tuple[Tensor, ...]:
    return _fake_scalars(queries, 3)


def _siglip_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    queries, keys, logit_scale, logit_bias, ctx.backend = inputs
    _, grad_scale, grad_bias = output
    ctx.mark_non_differentiable(grad_scale, grad_bias)
    ctx.save_for_backward(queries, keys, logit_scale, logit_bias, grad_scale, grad_bias)


def _siglip_backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    queries, keys, logit_scale, logit_bias, grad_scale, grad_bias = ctx.saved_tensors
    need_queries, need_keys, need_scale, need_bias, _ = ctx.needs_input_grad
    dqueries = dkeys = None
    if need_queries or need_keys:
        dqueries, dkeys = siglip_bwd(
            grad_loss, queries, keys, logit_scale, logit_bias, need_queries, need_keys, ctx.backend
        )
    return (
        dqueries if need_queries else None,
        dkeys if need_keys else None,
        grad_loss * grad_scale if need_scale else None,
        grad_loss * grad_bias if need_bias else None,
        None,
    )


siglip_bwd = Op(
    "contrastive_siglip_bwd",
    "(Tensor grad_loss, Tensor queries, Tensor keys, Tensor logit_scale, Tensor logit_bias, "
    "bool need_queries, bool need_keys, str backend) -> (Tensor dqueries, Tensor dkeys)",
    impls={"native": native.siglip_bwd, "triton": _triton("bwd", "siglip_bwd"), "reference": reference.siglip_bwd},
    fake=_plain_bwd_fake,
)

siglip_fwd = Op(
    "contrastive_siglip_fwd",
    "(Tensor queries, Tensor keys, Tensor logit_scale, Tensor logit_bias, str backend) "
    "-> (Tensor loss, Tensor grad_scale, Tensor grad_bias)",
    impls={"native": native.siglip_fwd, "triton": _triton("fwd", "siglip_fwd"), "reference": reference.siglip_fwd},
    fake=_siglip_fwd_fake,
    setup_context=_siglip_setup,
    backward=_siglip_backward,
)


# Retrieval


def _sample_fake(queries: Tensor, *args: Any) -> Tensor:
    return queries.new_empty(queries.shape[0], dtype=torch.int64)


def _topk_fake(queries: Tensor, keys: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    values = queries.new_empty(queries.shape[0], k, dtype=statistics_dtype(queries.dtype))
    return values, values.new_empty(values.shape, dtype=torch.int64)


sample_negatives = Op(
    "contrastive_sample_fwd",
    f"(Tensor queries, Tensor keys, Tensor logit_scale, Tensor seed, {_PAIRS}, str backend) -> Tensor",
    impls=_impls("sample_negatives", "fwd", 4, oracle=reference),
    fake=_sample_fake,
)

topk_similar = Op(
    "contrastive_topk_fwd",
    "(Tensor queries, Tensor keys, int k, str backend) -> (Tensor values, Tensor indices)",
    impls={
        "native": native.topk_similar,
        "triton": _triton("fwd", "topk_similar"),
        "reference": reference.topk_similar,
    },
    fake=_topk_fake,
)
