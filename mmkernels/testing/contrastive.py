"""Inputs for the contrastive losses, including adversarial ones, and the plain PyTorch baselines."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.ops.contrastive import FalseNegatives
from mmkernels.ops.dtypes import compute_dtype
from mmkernels.testing.accuracy import Accuracy, assert_as_accurate

__all__ = [
    "CASES",
    "Case",
    "compare",
    "features",
    "infonce_terms",
    "loss_and_gradients",
    "plain_infonce",
    "plain_infonce_options",
    "plain_infonce_two_matrices",
    "plain_siglip",
    "plain_similarity_logsumexp",
    "siglip_terms",
]


@dataclass(frozen=True)
class Case:
    """One input: sizes, how the features are drawn, and the scalars."""

    name: str
    n: int
    e: int
    kind: str = "aligned"
    scale: float = 14.3
    bias: float = -10.0

    def __str__(self) -> str:
        return self.name


def _aligned(n: int, e: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Unit rows; a key resembles its query (cosine about 0.7), as in mid-training."""
    queries = F.normalize(torch.randn(n, e, generator=generator, dtype=torch.float64), dim=1)
    noise = F.normalize(torch.randn(n, e, generator=generator, dtype=torch.float64), dim=1)
    return queries, F.normalize(queries + noise, dim=1)


def _random(n: int, e: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Independent unit rows, as at the start of training."""
    queries, keys = torch.randn(2, n, e, generator=generator, dtype=torch.float64)
    return F.normalize(queries, dim=1), F.normalize(keys, dim=1)


def _unnormalized(n: int, e: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Normal entries: similarities of the order of sqrt(E)."""
    queries, keys = torch.randn(2, n, e, generator=generator, dtype=torch.float64)
    return queries, keys


def _cone(n: int, e: int, generator: torch.Generator, width: float = 0.02) -> tuple[Tensor, Tensor]:
    """All rows within a narrow cone: cosines above 0.999, as in a freshly initialised tower."""
    axis = F.normalize(torch.randn(e, generator=generator, dtype=torch.float64), dim=0)
    queries, keys = axis + width * torch.randn(2, n, e, generator=generator, dtype=torch.float64) / e**0.5
    return F.normalize(queries, dim=1), F.normalize(keys, dim=1)


def _duplicates(n: int, e: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Every row occurs several times."""
    queries, keys = _aligned(max(n // 5, 1), e, generator)
    index = torch.arange(n) % queries.shape[0]
    return queries[index], keys[index]


def _solved(n: int, e: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Keys equal their queries: a loss near 0, gradients that cancel."""
    queries, _ = _aligned(n, e, generator)
    return queries, queries.clone()


def _falling(n: int, e: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Norms over four decades: running maxima rise late and far."""
    queries, keys = _unnormalized(n, e, generator)
    size = torch.logspace(-3, 1, n, dtype=torch.float64)[:, None]
    return queries * size / e**0.5, keys * size


_KINDS: dict[str, Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]] = {
    "aligned": _aligned,
    "random": _random,
    "unnormalized": _unnormalized,
    "cone": _cone,
    "wide cone": functools.partial(_cone, width=0.2),
    "needle": functools.partial(_cone, width=0.002),
    "duplicates": _duplicates,
    "solved": _solved,
    "falling": _falling,
}

CASES = (
    Case("one row", 1, 64),
    Case("one column", 37, 1),
    Case("two rows", 2, 3),
    Case("tile", 128, 64),
    Case("ragged", 203, 96),
    Case("E=384", 150, 384),
    Case("E=768", 97, 768),
    Case("E=1152", 65, 1152),
    Case("two tiles each way", 321, 40),
    Case("random", 200, 80, kind="random"),
    Case("scale=100, E=1024", 160, 1024, kind="unnormalized", scale=100.0),
    Case("cone", 190, 128, kind="cone", scale=100.0),
    Case("wide cone", 190, 96, kind="wide cone", bias=-3.0),
    Case("needle", 190, 96, kind="needle", bias=-3.0),
    Case("duplicates", 170, 64, kind="duplicates", scale=100.0),
    Case("solved", 140, 64, kind="solved", scale=30.0, bias=-15.0),
    Case("falling", 230, 48, kind="falling", scale=10.0, bias=0.0),
    Case("scale=0", 110, 56, scale=0.0),
    Case("negative scale", 90, 56, scale=-3.0, bias=2.0),
    Case("tiny scale", 90, 56, scale=1e-6, bias=-0.1),
    Case("huge scale", 70, 32, kind="aligned", scale=1e5, bias=-1e5),
)


def features(case: Case, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Queries and keys [N, E] of a case; drawn in float64, so every dtype rounds the same numbers."""
    queries, keys = _KINDS[case.kind](case.n, case.e, torch.Generator().manual_seed(seed))
    return queries.to(dtype), keys.to(dtype)


def plain_infonce(queries: Tensor, keys: Tensor, logit_scale: Tensor | float = 10.0) -> Tensor:
    """The usual CLIP loss: one logit matrix, cross entropy of it and of its transpose."""
    logits = logit_scale * queries @ keys.T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def plain_infonce_two_matrices(queries: Tensor, keys: Tensor, logit_scale: Tensor) -> Tensor:
    """The same with one matmul per direction: faster on CPU, and needed for gathered features."""
    labels = torch.arange(len(queries), device=queries.device)
    logits_q, logits_k = logit_scale * queries @ keys.T, logit_scale * keys @ queries.T
    return (F.cross_entropy(logits_q, labels) + F.cross_entropy(logits_k, labels)) / 2


def _plain_direction(
    logits: Tensor,
    positive: Tensor,
    seen: Tensor,
    extra: Tensor | None,
    label_smoothing: float,
    of_teacher: Tensor | None,
    alpha: float,
    weights: Tensor | None,
    decoupled: bool = False,
    harder: Tensor | None = None,
) -> Tensor:
    """Cross entropy of rows against their target distribution, materialised as [N, M]."""
    positives, everyone = positive.to(logits.dtype), seen.to(logits.dtype)
    target = (1 - label_smoothing) * positives / positives.sum(1, keepdim=True)
    target = target + label_smoothing * everyone / everyone.sum(1, keepdim=True)
    if of_teacher is not None:
        target = (1 - alpha) * target + alpha * of_teacher.masked_fill(~seen, -torch.inf).softmax(1)
    summed = logits if harder is None else torch.where(positive, logits, logits + harder)
    masked = summed.masked_fill(~seen | (positive & decoupled), -torch.inf)
    everything = masked if extra is None else torch.cat([masked, extra], 1)
    loss = everything.logsumexp(1) - (target * logits).sum(1)
    if decoupled:
        loss = loss.where((everything > -torch.inf).any(1), 0.0)
    return loss.mean() if weights is None else (weights.to(loss.dtype) * loss).sum() / weights.to(loss.dtype).sum()


def _similarity_of_negatives(queries: Tensor, negatives: Tensor) -> Tensor:
    """[N, K] of [K, E], or of [N, K, E]: each query's own."""
    return queries @ negatives.T if negatives.ndim == 2 else (negatives @ queries[:, :, None])[:, :, 0]


def _without_false_negatives(
    filtered: FalseNegatives, positive: Tensor, seen: Tensor, extra: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Pairs seen by rows and by columns, [N, M] each, and the logits of the negatives with -inf where not seen."""
    queries, keys, margin, kind, negatives = filtered

    def threshold(own: Tensor) -> Tensor:
        return own - margin * (own.abs() if kind == "relative" else 1)

    g = queries @ keys.T
    of_rows = threshold((g * positive).sum(1, keepdim=True))
    of_columns = threshold((g * positive).sum(0, keepdim=True))
    if extra is not None and negatives is not None:
        extra = extra.masked_fill(_similarity_of_negatives(queries, negatives) > of_rows, -torch.inf)
    return seen & (positive | ~(g > of_rows)), seen & (positive | ~(g > of_columns)), extra


def plain_infonce_options(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
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
) -> Tensor:
    """InfoNCE with every option, with logits and target distribution materialised."""
    (n, m), device = (len(queries), len(keys)), queries.device
    logits = logit_scale * queries @ keys.T
    positive = (torch.arange(n, device=device) if targets is None else targets)[:, None] == torch.arange(
        m, device=device
    )
    seen = torch.ones_like(positive)
    if query_ids is not None:
        same = query_ids[:, None] == (query_ids if key_ids is None else key_ids)
        positive, seen = (same, seen) if same_id == "positive" else (positive, ~same | positive)
    harder = hardness * (queries @ keys.T).detach() if hardness else None
    extra = None
    if negatives is not None:
        of_negatives = _similarity_of_negatives(queries, negatives)
        extra = logit_scale * of_negatives
        if hardness:
            extra = extra + hardness * of_negatives.detach()
    seen_q = seen_k = seen
    if false_negatives is not None:
        seen_q, seen_k, extra = _without_false_negatives(false_negatives, positive, seen, extra)
    of_teacher, alpha = None, 0.0
    if teacher is not None:
        of_teacher, alpha = logit_scale.detach() * teacher[0].detach() @ teacher[1].detach().T, teacher[2]
    loss = _plain_direction(
        logits, positive, seen_q, extra, label_smoothing, of_teacher, alpha, weights, decoupled, harder
    )
    if not symmetric:
        return loss
    if weights is not None and targets is not None:
        weights = weights[targets.argsort()]
    of_teacher = None if of_teacher is None else of_teacher.T
    harder = None if harder is None else harder.T
    back = _plain_direction(
        logits.T, positive.T, seen_k.T, None, label_smoothing, of_teacher, alpha, weights, decoupled, harder
    )
    return (loss + back) / 2


def plain_similarity_logsumexp(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor | float,
    *,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    guide: tuple[Tensor, Tensor] | None = None,
    thresholds: Tensor | None = None,
    hardness: float = 0.0,
) -> Tensor:
    """The log-sum-exp of each row of the logit matrix, without pairs of equal ids and those above a threshold."""
    logits = logit_scale * queries @ keys.T
    if hardness:
        logits = logits + hardness * (queries @ keys.T).detach()
    if guide is not None and thresholds is not None:
        logits = logits.masked_fill(guide[0] @ guide[1].T > thresholds[:, None], -torch.inf)
    if query_ids is not None:
        logits = logits.masked_fill(query_ids[:, None] == (query_ids if key_ids is None else key_ids), -torch.inf)
    return logits.logsumexp(1)


def plain_siglip(queries: Tensor, keys: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """The SigLIP loss as in its paper."""
    logits = logit_scale * queries @ keys.T + logit_bias
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)


def loss_and_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """The loss and its gradient with respect to each input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    loss = function(*leaves)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def infonce_terms(queries: Tensor, keys: Tensor, logit_scale: Tensor) -> tuple[Tensor, ...]:
    """Sums of the absolute terms of the loss and of each gradient, float64; a logit counts with its magnitude."""
    similarity = queries @ keys.T
    logits = logit_scale * similarity
    n, size = len(logits), 1 + logits.abs()
    weights = (logits.softmax(1) + logits.softmax(0)) * size + 2 * torch.eye(n, dtype=size.dtype, device=size.device)
    lse = logits.logsumexp(1).abs() + logits.logsumexp(0).abs()
    loss = (lse + 2 * logits.diagonal().abs()).mean() / 2
    weights = weights / (2 * n)
    features = logit_scale.abs() * weights @ keys.abs(), logit_scale.abs() * weights.T @ queries.abs()
    return loss, *features, (weights * similarity.abs()).sum()


def siglip_terms(queries: Tensor, keys: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> tuple[Tensor, ...]:
    """The same for the sigmoid loss."""
    similarity = queries @ keys.T
    logits = logit_scale * similarity + logit_bias
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
    size = 1 + (logit_scale * similarity).abs() + logit_bias.abs()
    weights = torch.sigmoid(-signs * logits) * size / len(logits)
    features = logit_scale.abs() * weights @ keys.abs(), logit_scale.abs() * weights.T @ queries.abs()
    loss = -F.logsigmoid(signs * logits).sum() / len(logits) + weights.sum()
    return loss, *features, (weights * similarity.abs()).sum(), weights.sum()


def compare(
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    case: Case,
    dtype: torch.dtype,
    names: Sequence[str],
    *,
    seeds: int = 8,
    device: str = "cpu",
) -> dict[str, Accuracy]:
    """Assert that a loss and its gradients are as accurate as plain PyTorch's in the same dtype.

    One draw says little about a scalar's error, so several seeds are judged together.

    Args:
        ours, plain: functions of queries, keys and the scalars, in the order of `names`.
        case, dtype, seeds, device: define the inputs.
        names: input names: ("queries", "keys", "logit_scale"), plus "logit_bias" for SigLIP.

    Raises:
        AssertionError: a larger error; the message names the result.
    """
    scalars = [torch.tensor(value, dtype=compute_dtype(dtype)) for value in (case.scale, case.bias)]
    terms_of = infonce_terms if len(names) == 3 else siglip_terms
    results: list[list[tuple[Tensor, ...]]] = []
    for seed in range(seeds):
        inputs = [x.to(device) for x in (*features(case, dtype, seed), *scalars[: len(names) - 2])]
        truth = loss_and_gradients(plain, *(x.double() for x in inputs))
        terms = terms_of(*(x.double() for x in inputs))
        results.append([loss_and_gradients(f, *inputs) for f in (ours, plain)] + [truth, terms])
    figures = {}
    for i, name in enumerate(("loss", *(f"gradient of {name}" for name in names))):
        got, expected, truth_of, sizes = (torch.stack([draw[who][i] for draw in results]) for who in range(4))
        figures[name] = assert_as_accurate(f"{case}, {dtype}: {name}", got, expected, truth_of, terms=sizes)
    return figures
