"""Argument checks of the contrastive losses; errors name the argument."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.checks import (
    describe,
    dtype_names,
    expect_tensor,
    expect_true,
    integer,
    real,
    wrong_type,
    wrong_value,
)
from mmkernels.ops.contrastive.types import Denominator, FalseNegatives, Guide, Pairs
from mmkernels.ops.dtypes import compute_dtype

__all__ = [
    "check_features",
    "check_flag",
    "denominator_of",
    "guide_of",
    "hardness_of",
    "limits_of",
    "negatives_of",
    "number_of_keys",
    "pairs_of",
    "scalar",
    "smoothing",
    "teacher_of",
    "unseen_of",
    "weights_of",
]


def limits_of(options: Mapping[str, Any], queries: Tensor) -> dict[str, str | None]:
    """The CUDA C++ kernels support only the plain losses."""
    used = ", ".join(name for name, value in options.items() if value is not None)
    return {"native": f"no CUDA C++ kernel supports {used}" if queries.is_cuda else None}


def check_flag(name: str, value: Any) -> None:
    """A bool."""
    if not isinstance(value, bool):
        wrong_type(name, "True or False", value)


def check_features(queries: Any, keys: Any) -> None:
    """[N, E] and [M, E] of one dtype and device."""
    expect_tensor("queries", queries, "[N, E] floating point", ndim=2)
    _like_queries("keys", "M", keys, queries)


def _like_queries(name: str, letter: str, value: Any, queries: Tensor) -> None:
    expect_tensor(name, value, f"[{letter}, E] floating point", ndim=2, like=queries)
    if value.dtype != queries.dtype:
        wrong_type(name, f"{str(queries.dtype).removeprefix('torch.')} like queries", value)
    if value.shape[1] != queries.shape[1]:
        wrong_value(name, f"[{letter}, {queries.shape[1]}], as wide as queries", value)


def scalar(name: str, value: Any, queries: Tensor) -> Tensor:
    """A number or one-element tensor as a [] tensor in the statistics' dtype; differentiable."""
    expected = "a number or a floating-point tensor of one element"
    dtype = compute_dtype(queries.dtype)
    if not isinstance(value, Tensor):
        return torch.full((), real(name, value, expected), dtype=dtype, device=queries.device)
    expect_tensor(name, value, expected, like=queries)
    if value.numel() != 1:
        wrong_value(name, expected, value)
    return value.to(dtype).reshape(())


def _fraction(name: str, value: Any) -> float:
    expected = "a number in [0, 1]"
    number = real(name, value, expected)
    if not 0 <= number <= 1:
        wrong_value(name, expected, value)
    return number


def smoothing(value: Any) -> float:
    """label_smoothing as in F.cross_entropy."""
    return _fraction("label_smoothing", value)


def _integers(name: str, value: Any, letter: str, count: int, queries: Tensor) -> Tensor:
    expected = f"[{count}] int64 or int32, one per {'query' if letter == 'N' else 'key'}"
    expect_tensor(name, value, expected, ndim=1, dtypes=(torch.int64, torch.int32), like=queries)
    if value.shape[0] != count:
        wrong_value(name, expected, value)
    return value.long()


def pairs_of(
    queries: Tensor,
    keys: Tensor,
    targets: Any,
    query_ids: Any,
    key_ids: Any,
    same_id: Any,
    *,
    both_ways: bool,
    each_has_one: bool = True,
) -> Pairs:
    """Check the arguments that define positives.

    Args:
        queries, keys: checked features.
        targets, query_ids, key_ids, same_id: as passed by the user.
        both_ways: every key also needs a positive query.
        each_has_one: a query without a positive is an error.
    """
    n, m = queries.shape[0], keys.shape[0]
    if same_id not in ("positive", "ignore"):
        wrong_value("same_id", "'positive' or 'ignore'", same_id)
    if key_ids is not None and query_ids is None:
        wrong_value("query_ids", "query ids, required with key_ids", None)
    if query_ids is not None:
        query_ids = _integers("query_ids", query_ids, "N", n, queries)
        if key_ids is None and n != m:
            wrong_value("key_ids", f"[{m}] int64 or int32, since the number of keys differs from queries", None)
        key_ids = query_ids if key_ids is None else _integers("key_ids", key_ids, "M", m, queries)
        if same_id == "positive":
            if targets is not None:
                raise ValueError(
                    "targets: expected None with query_ids, whose positives are the keys of the same id "
                    f"(same_id='ignore' accepts both), got {describe(targets)}"
                )
            if each_has_one:
                _ids_meet("query_ids", query_ids, key_ids, "key_ids")
                if both_ways and key_ids is not query_ids:
                    _ids_meet("key_ids", key_ids, query_ids, "query_ids (or symmetric=False)")
            return Pairs(None, query_ids, key_ids, same_id)
    elif same_id == "ignore":
        wrong_value("query_ids", "[N] ids, required when same_id='ignore'", None)
    return Pairs(_targets(targets, queries, keys, both_ways), query_ids, key_ids, same_id)


def unseen_of(queries: Tensor, keys: Tensor, query_ids: Any, key_ids: Any) -> Pairs:
    """Pairs with equal ids are not seen; none is positive."""
    if query_ids is None and key_ids is None:
        return Pairs()
    ids = pairs_of(queries, keys, None, query_ids, key_ids, "positive", both_ways=False, each_has_one=False)
    return Pairs(ids.targets, ids.query_ids, ids.key_ids, "ignore")  # torch 2.6 compiles no _replace


_NOT_FILTERED = "label_smoothing", "teacher", "return_stats"  # they need the number of keys that a row sees


def _false_negatives_of(
    filtered: Any, queries: Tensor, keys: Tensor, negatives: Tensor | None, pairs: Pairs, options: Mapping[str, Any]
) -> FalseNegatives | None:
    if filtered is None:
        return None
    if not isinstance(filtered, FalseNegatives):
        wrong_type("false_negatives", "None, or an mmkernels.FalseNegatives", filtered)
    for name in _NOT_FILTERED:
        if options[name] is not None:
            raise ValueError(f"{name}: expected to be left out with false_negatives, got {describe(options[name])}")
    if pairs.targets is None:
        wrong_value("same_id", "'ignore' with false_negatives and ids (a threshold needs one target)", "positive")
    filtered = _with_margin("false_negatives", filtered)
    if (negatives is None) != (filtered.guide_negatives is None):
        expected = "None without negatives" if negatives is None else "the guide's features of the negatives"
        wrong_value("false_negatives.guide_negatives", expected, filtered.guide_negatives)
    _check_guide("false_negatives", filtered, queries, keys, negatives)
    return filtered


def _with_margin(argument: str, filtered: FalseNegatives) -> FalseNegatives:
    """Its kind checked, its margin a float."""
    margin = real(f"{argument}.margin", filtered.margin, "a finite number")
    if not math.isfinite(margin):
        wrong_value(f"{argument}.margin", "a finite number", filtered.margin)
    if filtered.kind not in ("absolute", "relative"):
        wrong_value(f"{argument}.kind", "'absolute' or 'relative'", filtered.kind)
    queries, keys, _, kind, negatives = filtered
    return FalseNegatives(queries, keys, margin, kind, negatives)  # torch 2.6 compiles no _replace


def _check_guide(
    argument: str, filtered: FalseNegatives, queries: Tensor, keys: Tensor, negatives: Tensor | None
) -> None:
    """A row for each of the features, all of one width."""
    width: Any = "F"
    for field, own in (("queries", queries), ("keys", keys), ("negatives", negatives)):
        if own is None:
            continue
        name, features = f"{argument}.guide_{field}", getattr(filtered, f"guide_{field}")
        rows = "".join([f"{size}, " for size in own.shape[:-1]])  # no str: torch.compile has none of a size
        expected = f"[{rows}{width}] {dtype_names(own.dtype)}"
        expect_tensor(name, features, expected, ndim=own.ndim, dtypes=(own.dtype,), like=queries)
        if features.shape[:-1] != own.shape[:-1] or width not in ("F", features.shape[-1]):
            wrong_value(name, expected, features)
        width = features.shape[-1]


def guide_of(guide: Any, thresholds: Any, queries: Tensor, keys: Tensor) -> Guide | None:
    """A guide's features and the thresholds of rows, detached."""
    if guide is None and thresholds is None:
        return None
    if guide is None:
        wrong_value("guide", "(guide_queries, guide_keys), required with thresholds", None)
    if not isinstance(guide, tuple) or len(guide) != 2:
        wrong_type("guide", "(guide_queries, guide_keys)", guide)
    _check_guide("guide", FalseNegatives(*guide), queries, keys, None)
    expected = f"[{queries.shape[0]}] floating point, one per query, required with guide"
    expect_tensor("thresholds", thresholds, expected, ndim=1, like=queries)
    if thresholds.shape[0] != queries.shape[0]:
        wrong_value("thresholds", expected, thresholds)
    return Guide(guide[0].detach(), guide[1].detach(), thresholds.detach().to(compute_dtype(queries.dtype)))


def rule_of(thresholds: Any, queries: Tensor) -> FalseNegatives | None:
    """The rule of `similarity_logsumexp`'s thresholds, if it is one, and not numbers."""
    if not isinstance(thresholds, FalseNegatives):
        return None
    if thresholds.guide_negatives is not None:
        wrong_value("thresholds.guide_negatives", "None (negatives are keys like others)", thresholds.guide_negatives)
    _check_guide("thresholds", thresholds, queries, queries, None)
    return _with_margin("thresholds", thresholds)


def hardness_of(hardness: Any, scale: Tensor) -> float:
    """A finite number >= 0, with a scale that is not negative."""
    expected = "a finite number, at least 0"
    number = real("hardness", hardness, expected)
    if not 0 <= number < math.inf:
        wrong_value("hardness", expected, hardness)
    if number > 0:
        # Where scale + hardness is 0, no scale of the lse's gradient would give that of the similarities.
        expect_true(~(scale < 0), "logit_scale: expected at least 0 with hardness", scale)
    return number


def denominator_of(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    negatives: Tensor | None,
    pairs: Pairs,
    options: Mapping[str, Any],
    decoupled: Any,
    hardness: Any,
    false_negatives: Any,
) -> Denominator:
    """How the denominators differ from sums over all keys.

    Args:
        queries, keys, scale, negatives, pairs: checked.
        options: of the call by name, None where not used.
        decoupled, hardness, false_negatives: as passed by the user.
    """
    check_flag("decoupled", decoupled)
    filtered = _false_negatives_of(false_negatives, queries, keys, negatives, pairs, options)
    denominator = Denominator(decoupled, hardness_of(hardness, scale), filtered)
    if denominator.hardness and pairs.targets is None:
        wrong_value("same_id", "'ignore' with hardness and ids (one target per query)", "positive")
    if denominator.apart() and pairs.same_id == "ignore":
        targets, ids, key_ids = pairs.targets, pairs.query_ids, pairs.key_ids
        assert targets is not None and ids is not None and key_ids is not None
        # What the kernels leave out are equal ids, so a target with another id would be summed.
        if len(key_ids):
            same = key_ids[targets.clamp(0, len(key_ids) - 1)] == ids
            expect_true(
                same, "key_ids: expected the id of each query at its target, with decoupled or hardness", key_ids
            )
    return denominator


def _ids_meet(name: str, ids: Tensor, others: Tensor, of: str) -> None:
    expect_true(torch.isin(ids, others), f"{name}: expected each to occur among {of}", ids)


def _targets(targets: Any, queries: Tensor, keys: Tensor, both_ways: bool) -> Tensor:
    n, m = queries.shape[0], keys.shape[0]
    if both_ways and n != m:
        expected = f"[{n}, E], one per query (another number needs symmetric=False or ids)"
        wrong_value("keys", expected, keys)
    if targets is None:
        if n > m:
            wrong_value("keys", f"at least [{n}, E]: without targets, query i pairs with key i", keys)
        return torch.arange(n, device=queries.device)
    targets = _integers("targets", targets, "N", n, queries)
    expect_true((targets >= 0) & (targets < m), f"targets: expected indices of keys, 0 to {m - 1}", targets)
    if both_ways:
        # Each key is a target exactly once; otherwise some key would have no query.
        met = torch.zeros(m, dtype=torch.bool, device=queries.device).index_fill(
            0, targets.clamp(0, max(m - 1, 0)), True
        )
        expect_true(met, "targets: expected each key once (or symmetric=False)", targets)
    return targets


def negatives_of(negatives: Any, queries: Tensor) -> Tensor | None:
    """[K, E] or [N, K, E] like the queries, or None."""
    if negatives is None:
        return None
    n, e = queries.shape
    expected = f"[K, {e}] (seen by all queries) or [{n}, K, {e}] (each query's own)"
    expect_tensor("negatives", negatives, expected, like=queries)
    if negatives.dtype != queries.dtype:
        wrong_type("negatives", f"{str(queries.dtype).removeprefix('torch.')} like queries", negatives)
    if negatives.ndim not in (2, 3) or negatives.shape[-1] != e or (negatives.ndim == 3 and negatives.shape[0] != n):
        wrong_value("negatives", expected, negatives)
    return negatives


def weights_of(weights: Any, queries: Tensor, keys: Tensor, symmetric: bool, *, some: bool = True) -> Tensor | None:
    """[N], non-negative; if `some`, not all zero."""
    if weights is None:
        return None
    n, m = queries.shape[0], keys.shape[0]
    expected = f"[{n}] floating point, one per query"
    expect_tensor("weights", weights, expected, ndim=1, like=queries)
    if weights.shape[0] != n:
        wrong_value("weights", expected, weights)
    if weights.requires_grad:
        wrong_value("weights", "a tensor that requires no gradient", weights)
    if symmetric and n != m:
        wrong_value("weights", f"None, because the {m} keys have no weights (or symmetric=False)", weights)
    if n > 0:
        valid = (weights >= 0) & (weights < math.inf)
        valid = valid & (weights.sum() > 0) if some else valid
        expect_true(valid, "weights: expected finite non-negative numbers" + ", not all zero" * some, weights)
    return weights


def teacher_of(teacher: Any, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, float] | None:
    """(queries_m [N, F], keys_m [M, F], alpha)."""
    if teacher is None:
        return None
    if not isinstance(teacher, tuple) or len(teacher) != 3:
        wrong_type("teacher", "(queries_m, keys_m, alpha)", teacher)
    for name, of_teacher, own in (("teacher[0]", teacher[0], queries), ("teacher[1]", teacher[1], keys)):
        expected = f"[{own.shape[0]}, F] {str(own.dtype).removeprefix('torch.')}"
        expect_tensor(name, of_teacher, expected, ndim=2, dtypes=(own.dtype,), like=own)
        if of_teacher.shape[0] != own.shape[0]:
            wrong_value(name, expected, of_teacher)
    if teacher[0].shape[1] != teacher[1].shape[1]:
        wrong_value("teacher[1]", f"[{keys.shape[0]}, {teacher[0].shape[1]}], as wide as teacher[0]", teacher[1])
    return teacher[0], teacher[1], _fraction("teacher[2]", teacher[2])


def number_of_keys(k: Any, keys: Tensor) -> int:
    """k, the number of keys to return, checked."""
    number = integer("k", k, "an integer")
    if not 1 <= number <= keys.shape[0]:
        wrong_value("k", f"1 to {keys.shape[0]}, the number of keys", k)
    return number
