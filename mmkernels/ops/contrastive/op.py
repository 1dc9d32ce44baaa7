"""The contrastive ops: schema, fake, what is saved, backward.

    softmax_fwd/_bwd    statistics of rows and columns of the logits, and the gradient of any function of them: every
                        InfoNCE there is, a part of a distributed one too
    sigmoid_fwd/_bwd    the sum of all pairs' sigmoid losses
    infonce, siglip     their plain cases in one op, which the CUDA C++ kernels know
    sample, topk        retrieval; no gradient

Forwards also give the derivatives by the scalars (they come free from the statistics), which a backward op multiplies
by what comes in; the feature gradients it makes by recomputing the logits. What goes from one to the other is the lse
of every row and column, in float64: rounded to float32 it would put an error of half its last place into every softmax.
A feature gradient nobody needs is not computed: it comes as [0, E]. Second derivatives: op_second.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.contrastive import chunks, native, reference
from mmkernels.ops.contrastive.op_second import (
    PAIRS,
    TEACHER,
    infonce_second,
    siglip_second,
    sigmoid_second,
    softmax_second,
)
from mmkernels.ops.contrastive.reference import (
    COEFFICIENTS,
    LSE,
    MEAN,
    STATISTICS,
    TOTAL,
    Pairs,
    Teacher,
    statistics_dtype,
)
from mmkernels.runtime.legacy_register import Op, Second

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
        from mmkernels.ops.contrastive import triton_bwd, triton_fwd

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


def _with_scalars(
    runs: Mapping[str, Callable[..., Any]], features: int, saved: int, scalars: Callable[..., tuple[Tensor, ...]]
) -> dict[str, Any]:
    """Backends' feature gradients and, after them, those of the scalars, which come from what a forward has saved: the
    last so many tensors, which the backends do not see. `features` is the place of queries and keys."""

    def whole(run: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
        def gradients(*args: Any) -> tuple[Tensor, ...]:
            first, needs = args[:-2], args[-2:]
            if needs[0] or needs[1]:
                return *run(*first[:-saved], *needs), *scalars(*first)
            return *_fake_gradients(*first[features : features + 2], *needs), *scalars(*first)

        return gradients

    return {backend: whole(run) for backend, run in runs.items()}


def _flops(queries: Tensor, keys: Tensor, products: int, teacher: Tensor | None = None) -> int:
    """So many products of all pairs, and the teacher's similarities."""
    width = products * queries.shape[1] + (0 if teacher is None else teacher.shape[1])
    return 2 * queries.shape[0] * keys.shape[0] * width


def _bwd_flops(place: int, teacher: int | None = None) -> Callable[..., int]:
    """The logits again, and a product for each feature gradient that is needed."""

    def count(*args: Any) -> int:
        needed = args[-3] + args[-2]
        of_teacher = None if teacher is None else args[teacher]
        return _flops(args[place], args[place + 1], 1 + needed, of_teacher) if needed else 0

    return count


def _fwd_flops(teacher: int | None = None) -> Callable[..., int]:
    return lambda *args: _flops(args[0], args[1], 1, None if teacher is None else args[teacher])


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


def _softmax_bwd_fake(coefficients_q: Tensor, coefficients_k: Tensor, *args: Any) -> tuple[Tensor, ...]:
    queries, keys, logit_scale, *_, mean_q, _mean_k, need_queries, need_keys, _backend = args
    dscale = logit_scale.new_empty(0 if mean_q is None else ())
    return *_fake_gradients(queries, keys, need_queries, need_keys), dscale


def _softmax_scale(coefficients_q: Tensor, coefficients_k: Tensor, *args: Any) -> tuple[Tensor]:
    """An lse of nothing is constant; its mean is 0."""
    logit_scale, mean_q, mean_k = args[2], args[-2], args[-1]
    if mean_q is None:
        return (logit_scale.new_empty(0),)
    return (((coefficients_q[LSE] * mean_q).sum() + (coefficients_k[LSE] * mean_k).sum()).to(logit_scale.dtype),)


def _softmax_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    queries, keys, logit_scale, *pairs, ctx.same_id, tq, tk, tlse_q, tlse_k, ctx.totals, _, ctx.backend = inputs
    ctx.save_for_backward(queries, keys, logit_scale, *pairs, tq, tk, tlse_q, tlse_k, *output)


def _softmax_saved(ctx: Any, need_queries: bool, need_keys: bool, need_scale: bool) -> tuple[Any, ...]:
    """As the backward and the second op want it."""
    *features, targets, query_ids, key_ids, tq, tk, tlse_q, tlse_k, of_rows, of_columns = ctx.saved_tensors
    rules = targets, query_ids, key_ids, ctx.same_id, tq, tk, tlse_q, tlse_k
    mean = (of_rows[MEAN], of_columns[MEAN]) if need_scale else (None, None)
    return *features, of_rows[LSE], of_columns[LSE], *rules, *mean, need_queries, need_keys, ctx.backend


def _softmax_backward(ctx: Any, grad_rows: Tensor, grad_columns: Tensor) -> tuple[Any, ...]:
    need = ctx.needs_input_grad[:3]
    if not any(need):
        return (None,) * 14
    grads = softmax_bwd(grad_rows[:COEFFICIENTS], grad_columns[:COEFFICIENTS], *_softmax_saved(ctx, *need))
    return *(grad if needed else None for grad, needed in zip(grads, need, strict=True)), *(None,) * 11


def _softmax_jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
    of_rows, of_columns, *_ = softmax_second(*tangents[:3], None, None, *_softmax_saved(ctx, True, True, True))
    return _all_statistics(of_rows, ctx.totals), _all_statistics(of_columns, ctx.totals)


def _all_statistics(tangents: Tensor, totals: bool) -> Tensor:
    """Those that are not differentiable, and totals that were not asked for, are constant."""
    *others, teacher = tangents.split(1)
    zero = torch.zeros_like(teacher)
    others[TOTAL] = others[TOTAL] if totals else zero
    return torch.cat([*others, teacher, *[zero] * (STATISTICS - COEFFICIENTS)])


softmax_bwd = Op(
    "contrastive_softmax_bwd",
    "(Tensor coefficients_q, Tensor coefficients_k, Tensor queries, Tensor keys, Tensor logit_scale, Tensor lse_q, "
    f"Tensor lse_k, {PAIRS}, str same_id, {TEACHER}, Tensor? mean_q, Tensor? mean_k, bool need_queries, "
    "bool need_keys, str backend) -> (Tensor dqueries, Tensor dkeys, Tensor dscale)",
    impls=_with_scalars(_impls("softmax_bwd", "bwd", 7, teacher=True), 2, 2, _softmax_scale),
    fake=_softmax_bwd_fake,
    flops=_bwd_flops(2, teacher=11),
    second=Second(softmax_second, grads=2, wrt=(2, 3, 4)),
)

softmax_fwd = Op(
    "contrastive_softmax_fwd",
    f"(Tensor queries, Tensor keys, Tensor logit_scale, {PAIRS}, str same_id, {TEACHER}, bool totals, bool columns, "
    "str backend) -> (Tensor rows, Tensor columns)",
    impls=_impls("softmax_fwd", "fwd", 3, teacher=True),
    fake=_softmax_fwd_fake,
    setup_context=_softmax_setup,
    backward=_softmax_backward,
    jvp=_softmax_jvp,
    flops=_fwd_flops(teacher=7),
)


# Sigmoid: [3] float64, the sum of all pairs' losses and its derivatives by scale and bias. The first is differentiable.


def _sigmoid_fwd_fake(queries: Tensor, *args: Any) -> Tensor:
    return queries.new_empty(3, dtype=torch.float64)


def _sigmoid_bwd_fake(grad_sum: Tensor, queries: Tensor, keys: Tensor, *args: Any) -> tuple[Tensor, ...]:
    logit_scale, logit_bias, *_, sums, need_queries, need_keys, _backend = args
    scalars = (x.new_empty(0 if sums is None else ()) for x in (logit_scale, logit_bias))
    return *_fake_gradients(queries, keys, need_queries, need_keys), *scalars


def _sigmoid_scalars(grad_sum: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    logit_scale, logit_bias, sums = args[2], args[3], args[-1]
    if sums is None:
        return logit_scale.new_empty(0), logit_bias.new_empty(0)
    return (grad_sum * sums[1]).to(logit_scale.dtype), (grad_sum * sums[2]).to(logit_bias.dtype)


def _sigmoid_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output)


def _sigmoid_backward(ctx: Any, grad_sums: Tensor) -> tuple[Any, ...]:
    need = ctx.needs_input_grad[:4]
    grads = sigmoid_bwd(grad_sums[0], *ctx.saved_tensors, *need[:2], ctx.backend)
    return *(grad if needed else None for grad, needed in zip(grads, need, strict=True)), *(None,) * 4


def _sigmoid_jvp(ctx: Any, *tangents: Any) -> Tensor:
    moved = sigmoid_second(*tangents[:4], None, *ctx.saved_tensors, True, True, ctx.backend)[0]
    return torch.stack([moved, torch.zeros_like(moved), torch.zeros_like(moved)])


sigmoid_bwd = Op(
    "contrastive_sigmoid_bwd",
    f"(Tensor grad_sum, Tensor queries, Tensor keys, Tensor logit_scale, Tensor logit_bias, {PAIRS}, Tensor? sums, "
    "bool need_queries, bool need_keys, str backend) -> (Tensor dqueries, Tensor dkeys, Tensor dscale, Tensor dbias)",
    impls=_with_scalars(_impls("sigmoid_bwd", "bwd", 5), 1, 1, _sigmoid_scalars),
    fake=_sigmoid_bwd_fake,
    flops=_bwd_flops(1),
    second=Second(sigmoid_second, grads=1, wrt=(1, 2, 3, 4)),
)

sigmoid_fwd = Op(
    "contrastive_sigmoid_fwd",
    f"(Tensor queries, Tensor keys, Tensor logit_scale, Tensor logit_bias, {PAIRS}, str backend) -> Tensor",
    impls=_impls("sigmoid_fwd", "fwd", 4),
    fake=_sigmoid_fwd_fake,
    setup_context=_sigmoid_setup,
    backward=_sigmoid_backward,
    jvp=_sigmoid_jvp,
    flops=_fwd_flops(),
)


# The plain losses: the first output is differentiable, the others are saved, among them last the scalars' derivatives


def _plain_impls(name: str, direction: str) -> dict[str, Callable[..., Any]]:
    return {"native": getattr(native, name), "triton": _triton(direction, name), "reference": getattr(reference, name)}


def _plain_bwd_impls(name: str, scalars: int) -> dict[str, Any]:
    def of_scalars(grad_loss: Tensor, *args: Any) -> tuple[Tensor, ...]:
        return tuple(grad_loss * derivative for derivative in args[-scalars:])

    return _with_scalars(_plain_impls(name, "bwd"), 1, scalars, of_scalars)


def _plain_bwd_fake(scalars: int) -> Callable[..., tuple[Tensor, ...]]:
    def fake(grad_loss: Tensor, queries: Tensor, keys: Tensor, *args: Any) -> tuple[Tensor, ...]:
        *saved, need_queries, need_keys, _backend = args
        return *_fake_gradients(queries, keys, need_queries, need_keys), *map(torch.empty_like, saved[-scalars:])

    return fake


def _plain_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:])


def _plain_backward(bwd: Op) -> Callable[..., tuple[Any, ...]]:
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
        *need, _backend = ctx.needs_input_grad
        grads = bwd(grad_loss, *ctx.saved_tensors, *need[:2], ctx.backend)
        return *(grad if needed else None for grad, needed in zip(grads, need, strict=True)), None

    return backward


def _plain_jvp(second: Op, outputs: int) -> Callable[..., tuple[Any, ...]]:
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        moved = second(*tangents[:-1], None, *ctx.saved_tensors, True, True, ctx.backend)
        return moved[0], *(None,) * (outputs - 1)

    return jvp


def _infonce_fwd_fake(queries: Tensor, keys: Tensor, logit_scale: Tensor, backend: str) -> tuple[Tensor, ...]:
    loss, grad_scale = _fake_scalars(queries, 2)
    lse = [x.new_empty(x.shape[0], dtype=torch.float64) for x in (queries, keys)]
    return loss, *lse, grad_scale


infonce_bwd = Op(
    "contrastive_infonce_bwd",
    "(Tensor grad_loss, Tensor queries, Tensor keys, Tensor logit_scale, Tensor lse_q, Tensor lse_k, "
    "Tensor grad_scale, bool need_queries, bool need_keys, str backend) "
    "-> (Tensor dqueries, Tensor dkeys, Tensor dscale)",
    impls=_plain_bwd_impls("infonce_bwd", 1),
    fake=_plain_bwd_fake(1),
    flops=_bwd_flops(1),
    second=Second(infonce_second, grads=1, wrt=(1, 2, 3)),
)

infonce_fwd = Op(
    "contrastive_infonce_fwd",
    "(Tensor queries, Tensor keys, Tensor logit_scale, str backend) "
    "-> (Tensor loss, Tensor lse_q, Tensor lse_k, Tensor grad_scale)",
    impls=_plain_impls("infonce_fwd", "fwd"),
    fake=_infonce_fwd_fake,
    setup_context=_plain_setup,
    backward=_plain_backward(infonce_bwd),
    jvp=_plain_jvp(infonce_second, 4),
    flops=_fwd_flops(),
)


def _siglip_fwd_fake(
    queries: Tensor, keys: Tensor, logit_scale: Tensor, logit_bias: Tensor, backend: str
) -> tuple[Tensor, ...]:
    return _fake_scalars(queries, 3)


siglip_bwd = Op(
    "contrastive_siglip_bwd",
    "(Tensor grad_loss, Tensor queries, Tensor keys, Tensor logit_scale, Tensor logit_bias, Tensor grad_scale, "
    "Tensor grad_bias, bool need_queries, bool need_keys, str backend) "
    "-> (Tensor dqueries, Tensor dkeys, Tensor dscale, Tensor dbias)",
    impls=_plain_bwd_impls("siglip_bwd", 2),
    fake=_plain_bwd_fake(2),
    flops=_bwd_flops(1),
    second=Second(siglip_second, grads=1, wrt=(1, 2, 3, 4)),
)

siglip_fwd = Op(
    "contrastive_siglip_fwd",
    "(Tensor queries, Tensor keys, Tensor logit_scale, Tensor logit_bias, str backend) "
    "-> (Tensor loss, Tensor grad_scale, Tensor grad_bias)",
    impls=_plain_impls("siglip_fwd", "fwd"),
    fake=_siglip_fwd_fake,
    setup_context=_plain_setup,
    backward=_plain_backward(siglip_bwd),
    jvp=_plain_jvp(siglip_second, 3),
    flops=_fwd_flops(),
)


# Retrieval


def _sample_fake(queries: Tensor, *args: Any) -> Tensor:
    return queries.new_empty(queries.shape[0], dtype=torch.int64)


def _topk_fake(queries: Tensor, keys: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    values = queries.new_empty(queries.shape[0], k, dtype=statistics_dtype(queries.dtype))
    return values, values.new_empty(values.shape, dtype=torch.int64)


sample_negatives = Op(
    "contrastive_sample_fwd",
    f"(Tensor queries, Tensor keys, Tensor logit_scale, Tensor seed, {PAIRS}, str backend) -> Tensor",
    impls=_impls("sample_negatives", "fwd", 4, oracle=reference),
    fake=_sample_fake,
    flops=_fwd_flops(),
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
    flops=_fwd_flops(),
)
