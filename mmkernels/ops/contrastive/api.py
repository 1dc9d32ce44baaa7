"""The contrastive functions: documentation, validation, routing."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.checks import deprecated_deterministic, wrong_type, wrong_value
from mmkernels.ops.contrastive import op_plain, op_search
from mmkernels.ops.contrastive.checks import (
    check_features,
    check_flag,
    denominator_of,
    limits_of,
    negatives_of,
    number_of_keys,
    pairs_of,
    scalar,
    smoothing,
    teacher_of,
    weights_of,
)
from mmkernels.ops.contrastive.exchange import checked_machine
from mmkernels.ops.contrastive.gathering import GatheredKeys, check_gathered, gather_keys
from mmkernels.ops.contrastive.losses import Over, infonce_loss, siglip_loss
from mmkernels.ops.contrastive.over import Local
from mmkernels.ops.contrastive.over_ranks import infonce_over_ranks, refusing, siglip_over_ranks
from mmkernels.ops.contrastive.types import ContrastiveStats, FalseNegatives, Targets
from mmkernels.runtime.backends import resolve
from mmkernels.runtime.machine import Machine

__all__ = [
    "ContrastiveStats",
    "FalseNegatives",
    "GatheredKeys",
    "gather_keys",
    "infonce",
    "sample_negatives",
    "siglip",
    "topk_similar",
]


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
    decoupled: bool = False,
    hardness: float = 0.0,
    false_negatives: FalseNegatives | None = None,
    group: Any = None,
    exchange: str = "auto",
    machine: Machine | None = None,
    gathered: GatheredKeys | None = None,
    return_stats: bool = False,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> Any:
    """InfoNCE (the CLIP loss and its relatives) in O((N+M)·E) memory: the logits are never stored.

    With `s_ij = logit_scale · <x_i, y_j>`, and a target distribution `t_i` over the keys of each query:

        loss = mean_i [log sum_j exp(s_ij) - sum_j t_ij s_ij]

    and, if symmetric, the mean of that and the same with queries and keys swapped. By default `t_i` is one-hot at key
    i. Features are not normalised and keep their dtype under autocast. Products accumulate in float32 (float64 for
    float64 features), the dtype of the loss; O(N) quantities are float64.

    Args:
        queries: [N, E] float32, bfloat16, float16 or float64.
        keys: [M, E], same dtype and device. M == N, unless symmetric is False or positives are found by ids.
        logit_scale: multiplies the similarities (already exponentiated): a number, or a tensor of one element of any
            floating dtype, which gets its exact gradient.
        targets: [N] int64 or int32: the index of each query's key; by default i. If symmetric, each key occurs once.
        query_ids, key_ids: [N], [M] int64 or int32, such as class or image ids; key_ids default to query_ids.
        same_id: how pairs with the same id are treated. "positive": the target is uniform over the keys with the
            query's id (at least one; targets must be None). "ignore": they are left out of the denominator, except the
            target.
        negatives: same dtype and device: extra keys that are positives of no query and join the denominator of the
            queries->keys direction only. [K, E]: seen by every query (hard negatives, a queue); [N, K, E]: K for each
            query, seen by it alone.
        label_smoothing: e in [0, 1]: the target is mixed (1-e) : e with the uniform distribution over the keys that the
            row sees (without `negatives`), as in `F.cross_entropy`.
        symmetric: average both directions, or only queries->keys.
        weights: [N] floating point, not negative, not all zero, without gradient: the mean is sum(w·l) / sum(w). If
            symmetric, a key has the weight of its query (N == M).
        teacher: (queries_m [N, F], keys_m [M, F], alpha in [0, 1]): momentum distillation. The target (after smoothing)
            is mixed (1-alpha) : alpha with the softmax of `logit_scale · <queries_m, keys_m>`, which gets no gradient.
        decoupled: leave a row's positives out of its denominator, which then sums negatives only. They are not summed
            rather than subtracted, so nothing cancels. With same_id="ignore" each target must have the id of its
            query. A row without negatives has loss 0 and no gradient. Statistics are those of decoupled=False.
        hardness: h >= 0: `h · <x_i, y_j>`, without its gradient, is added to the logit of each negative in the
            denominators, of either direction and of `negatives`: the harder a negative, the more it weighs. One target
            per query, whose id, with same_id="ignore", is its query's; the scale must not be negative. Statistics are
            those of hardness=0.
        false_negatives: a guide's features and a margin: keys and negatives that the guide finds more similar to a
            query than its target are left out of the denominator (see `FalseNegatives`). One target per query; no
            label_smoothing, teacher or return_stats. It costs a second product per pass and, if symmetric, a pass for
            each direction, because a key has another threshold than a query.
        group: a process group of torch.distributed: the rows are this rank's (any number, including 0), and every rank
            gets the loss of one process with all rows. Gradients assume averaging over the ranks, as in
            DistributedDataParallel: features and negatives get W times their gradient, the scale its full gradient on
            every rank. targets index this rank's keys; ids match across all ranks. A rank's negatives [K, E] (any
            number) are keys of every rank's queries, so a queue replicated on all ranks would count W times: give each
            rank its shard. The statistics lse_q and lse_k cover this rank's rows, the others all ranks. Everything else
            must be the same on all ranks.
        exchange: how keys and negatives are exchanged: "all_gather" (all at once, O(N·E) memory), "ring" (block by
            block, O(N/W·E), overlapped with computation) or "auto", for keys and negatives separately: the ring if all
            ranks' keys with their gradients would take more than a quarter of a rank's memory, or if the step is
            predicted to be faster with it; otherwise all_gather. Only used with a group.
        machine: the `Machine` by which "auto" predicts; by default a GPU's from its data sheet, or a CPU's over gloo.
            Nothing is measured in a call (`Machine.measured` measures beforehand). Ranks may have different ones: all
            choose by the slowest of each figure, so they choose alike. Only used with a group.
        gathered: what `gather_keys` returned for these keys, if their exchange has begun before; it is then not chosen.
        return_stats: also return `ContrastiveStats`, from the same pass.
        deterministic: deprecated, without effect: every backend gives the same bits for the same input and machine, on
            a CPU for any number of threads.
        backend: None picks the fastest one that supports the call; or "native", "triton", "reference". On a GPU
            "native" supports only the plain loss: N pairs of query i and key i, no options.

    Returns:
        the loss, a scalar in float32 (float64 for float64 features), differentiable with respect to queries, keys and
        logit_scale, twice, and in forward mode (not over a group); with return_stats (loss, ContrastiveStats). The loss
        of an empty batch is 0, with zero gradients (`F.cross_entropy` gives NaN), so that a rank without samples does
        not poison a mean. NaN or inf in the features or the scale makes the loss or its gradients NaN or inf.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range. On a GPU, and under
            torch.compile, values (targets, ids, weights) are asserted on the device: RuntimeError.
        mmkernels.BackendError: `backend` does not support this call.

    Source: van den Oord et al. 2018 (arXiv:1807.03748); Radford et al. 2021 (arXiv:2103.00020); Khosla et al. 2020
    (arXiv:2004.11362, several positives); Li et al. 2021 (arXiv:2107.07651, teacher); Yeh et al. 2022
    (arXiv:2110.06848, decoupled); Lan et al. 2025 (arXiv:2503.04812, hardness); Solatorio 2024
    (arXiv:2402.16829, false_negatives).
    """
    with _checking(group, exchange, machine, queries):
        deprecated_deterministic(deterministic)
        check_flag("symmetric", symmetric)
        check_flag("return_stats", return_stats)
        check_features(queries, keys)
        scale, smooth = scalar("logit_scale", logit_scale, queries), smoothing(label_smoothing)
        options = {
            "targets": targets,
            "query_ids": query_ids,
            "negatives": negatives,
            "weights": weights,
            "teacher": teacher,
            "decoupled": decoupled or None,
            "hardness": hardness or None,
            "false_negatives": false_negatives,
            "label_smoothing": smooth or None,
            "symmetric=False": None if symmetric else True,
            "return_stats": return_stats or None,
            "group": group,
        }
        one_has = group is None  # over ranks, checked later among all keys
        pairs = pairs_of(queries, keys, targets, query_ids, key_ids, same_id, both_ways=symmetric, each_has_one=one_has)
        soft, extra = Targets(smooth, teacher_of(teacher, queries, keys)), negatives_of(negatives, queries)
        rules = denominator_of(queries, keys, scale, extra, pairs, options, decoupled, hardness, false_negatives)
        row_weights = weights_of(weights, queries, keys, symmetric, some=one_has)
        plain = all(option is None for option in options.values())
        chosen = resolve("contrastive", queries, backend, None if plain else limits_of(options, queries))
        here = None if group is None else checked_machine(machine, queries)
        check_gathered(gathered, keys, group, exchange)
    if plain:
        return op_plain.infonce_fwd(queries, keys, scale, chosen)[0]
    call = queries, keys, scale, pairs, soft, extra, rules, row_weights, symmetric, return_stats
    over: Over = Local(queries, keys) if here is None else infonce_over_ranks(group, exchange, here, *call, gathered)
    loss, stats = infonce_loss(*call, over, chosen)
    return (loss, stats) if return_stats else loss


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
    machine: Machine | None = None,
    gathered: GatheredKeys | None = None,
    return_stats: bool = False,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> Any:
    """The pairwise sigmoid loss of SigLIP in O((N+M)·E) memory: the logits are never stored.

        loss = -1/N · sum_ij log sigmoid(z_ij · (logit_scale · <x_i, y_j> + logit_bias))

    with `z_ij` = +1 for a positive pair, else -1. Features are not normalised and keep their dtype under autocast.
    Products accumulate in float32 (float64 for float64 features), the dtype of the loss.

    Args:
        queries: [N, E] float32, bfloat16, float16 or float64.
        keys: [M, E], same dtype and device; M == N unless there are ids.
        logit_scale: multiplies the similarities: a number, or a tensor of one element of any floating dtype, which gets
            its exact gradient.
        logit_bias: added to the logits; like logit_scale.
        query_ids, key_ids: [N], [M] int64 or int32: pairs with the same id are positive; key_ids default to query_ids.
            Without ids the positive of query i is key i.
        group, exchange, machine, gathered: as in `infonce`; scale and bias get their full gradient on every rank.
        return_stats: also return `ContrastiveStats` of the same logits, from a separate forward pass.
        deterministic: deprecated, without effect: every backend gives the same bits for the same input and machine, on
            a CPU for any number of threads.
        backend: None picks the fastest one that supports the call; or "native", "triton", "reference". On a GPU
            "native" supports neither ids nor return_stats.

    Returns:
        the loss, a scalar in float32 (float64 for float64 features), differentiable with respect to queries, keys,
        logit_scale and logit_bias, twice, and in forward mode (not over a group); with return_stats (loss,
        ContrastiveStats). The loss of an empty batch is 0, with zero gradients. NaN or inf in the input propagates.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        mmkernels.BackendError: `backend` does not support this call.

    Source: Zhai et al. 2023 (arXiv:2303.15343).
    """
    with _checking(group, exchange, machine, queries):
        deprecated_deterministic(deterministic)
        check_flag("return_stats", return_stats)
        check_features(queries, keys)
        scale, bias = scalar("logit_scale", logit_scale, queries), scalar("logit_bias", logit_bias, queries)
        pairs = pairs_of(queries, keys, None, query_ids, key_ids, "positive", both_ways=True, each_has_one=False)
        plain = query_ids is None and not return_stats and group is None
        options = {"query_ids": query_ids, "return_stats": return_stats or None, "group": group}
        chosen = resolve("contrastive", queries, backend, None if plain else limits_of(options, queries))
        here = None if group is None else checked_machine(machine, queries)
        check_gathered(gathered, keys, group, exchange)
    if plain:
        return op_plain.siglip_fwd(queries, keys, scale, bias, chosen)[0]
    call = queries, keys, scale, bias, pairs, return_stats
    over: Over = Local(queries, keys) if here is None else siglip_over_ranks(group, exchange, here, *call, gathered)
    loss, stats = siglip_loss(*call, over, chosen)
    return (loss, stats) if return_stats else loss


@torch.no_grad()
def sample_negatives(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor | float,
    *,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    targets: Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Tensor:
    """Draw a hard negative per query: key j with its softmax probability among the query's negatives.

    Sampled as `argmax_j logit_scale · <x_i, y_j> - log E_ij` with exponential variates E_ij that depend only on i, j
    and two numbers from the generator. No N x M matrix is stored, and every backend draws the same keys.

    Args:
        queries: [N, E] float32, bfloat16, float16 or float64.
        keys: [M, E], same dtype and device.
        logit_scale: a number or a floating-point tensor of one element; larger means harder negatives.
        query_ids, key_ids: [N], [M] int64 or int32: keys with the query's id are not negatives; key_ids default to
            query_ids.
        targets: [N] int64 or int32: the index of each query's positive, if there are no ids; by default i.
        generator: a CPU generator, or None for torch's default one.
        backend: None picks the fastest one that supports the call; or "native" (CPU), "triton", "reference", which
            stores the logits.

    Returns:
        [N] int64 key indices; -1 for a query without negatives. No gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
        mmkernels.BackendError: `backend` does not support this call.

    Source: Gumbel 1954; Li et al. 2021 (arXiv:2107.07651, negatives for image-text matching).
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        wrong_type("generator", "a torch.Generator or None", generator)
    if generator is not None and generator.device.type != "cpu":
        wrong_value("generator", "a CPU generator", generator.device)
    check_features(queries, keys)
    scale = scalar("logit_scale", logit_scale, queries)
    pairs = pairs_of(queries, keys, targets, query_ids, key_ids, "positive", both_ways=False, each_has_one=False)
    seed = torch.randint(2**32, (2,), generator=generator, device="cpu").to(queries.device)
    chosen = resolve("contrastive", queries, backend, limits_of({"sample_negatives": True}, queries))
    return op_search.sample_negatives(queries.detach(), keys.detach(), scale.detach(), seed, pairs, chosen)


@torch.no_grad()
def topk_similar(queries: Tensor, keys: Tensor, k: int, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """The k keys with the largest inner products per query, streaming: no N x M matrix is stored.

    Args:
        queries: [N, E] float32, bfloat16, float16 or float64.
        keys: [M, E], same dtype and device.
        k: 1 to M.
        backend: None picks the fastest one that supports the call; or "native" (CPU), "triton", "reference", which
            stores the similarities. On a GPU, one pass over the keys per 128 of k.

    Returns:
        values [N, k] in float32 (float64 for float64 features), largest first, and indices [N, k] int64; ties go to the
        lower index. NaN counts as -inf. No gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
        mmkernels.BackendError: `backend` does not support this call.
    """
    check_features(queries, keys)
    k = number_of_keys(k, keys)
    chosen = resolve("contrastive", queries, backend, limits_of({"topk_similar": True}, queries))
    return op_search.topk_similar(queries.detach(), keys.detach(), k, chosen)


def _checking(group: Any, exchange: Any, machine: Any, features: Any) -> AbstractContextManager[None]:
    """Context for argument checks; with a group it tells the other ranks of an error."""
    if group is not None:
        return refusing(group, exchange, features)
    if exchange != "auto":
        wrong_value("exchange", "'auto' without a group", exchange)
    if machine is not None:
        wrong_value("machine", "None without a group", machine)
    return nullcontext()  # torch.compile can trace this; in torch 2.6 it cannot trace generator-based context managers
