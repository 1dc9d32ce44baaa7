"""Losses of other libraries, written out densely in float64, from `infonce` and `similarity_logsumexp`.

MultipleNegativesRankingLoss and GISTEmbedLoss of Sentence Transformers 5, cached or not, in every mode. `docs` are the
positives followed by K hard negatives of each query: [1 + K, N, E].
"""

import functools
import itertools

import named
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels import FalseNegatives, infonce, similarity_logsumexp

N, E, SCALE = 23, 12, 20.0
OWN = torch.arange(N)
DIRECTIONS = ("query_to_query", "doc_to_query", "doc_to_doc")


def drawn(*shape, seed):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def batch(negatives):
    """Queries [N, E], documents that resemble them [1 + K, N, E]."""
    queries = drawn(N, E, seed=1)
    return queries, F.normalize(queries + 0.8 * drawn(1 + negatives, N, E, seed=2), dim=-1)


def agree(ours, dense, *inputs):
    results = []
    for function in (ours, dense):
        leaves = [x.clone().requires_grad_() for x in inputs]
        loss = function(*leaves)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


# MultipleNegativesRankingLoss


def dense_ranking(queries, docs, directions, partition="joint", mode=None, strength=0.0):
    everything = docs.flatten(0, 1)
    eye, k = torch.eye(N, dtype=torch.bool), len(docs)
    sims = {"query_to_doc": queries @ everything.T}
    if "query_to_query" in directions:
        sims["query_to_query"] = (queries @ queries.T).masked_fill(eye, -torch.inf)
    if "doc_to_query" in directions:
        sims["doc_to_query"] = docs[0] @ queries.T
    if "doc_to_doc" in directions:
        sims["doc_to_doc"] = (docs[0] @ everything.T).masked_fill(eye.repeat(1, k), -torch.inf)
    own = eye.repeat(1, k)
    positive = own.clone()
    positive[:, N:] = False
    unpenalised = {
        None: torch.ones_like(own),
        "in_batch_negatives": own,
        "hard_negatives": ~own | positive,
        "all_negatives": positive,
    }[mode]
    penalty = (strength * sims["query_to_doc"].detach()).masked_fill(unpenalised, 0.0)
    logits = {name: SCALE * sim for name, sim in sims.items()}
    logits["query_to_doc"] = logits["query_to_doc"] + penalty
    if partition == "joint":
        log_z = torch.cat(list(logits.values()), 1).logsumexp(1)
    else:
        log_z = torch.stack([x.logsumexp(1) for x in logits.values()]).mean(0)
    return (log_z - logits["query_to_doc"].diagonal()).mean()


def ranking(queries, docs, directions, partition="joint", mode=None, strength=0.0):
    """The same, without a matrix."""
    everything, of_query = docs.flatten(0, 1), OWN.repeat(len(docs))
    positive = SCALE * (queries * docs[0]).sum(1)
    own = SCALE * torch.einsum("ne,kne->nk", queries, docs[1:])
    harder = own + strength / SCALE * own.detach()
    if mode is None:
        lse = [similarity_logsumexp(queries, everything, SCALE)]
    else:
        in_batch = 0.0 if mode == "hard_negatives" else strength
        others = dict(query_ids=OWN, key_ids=of_query, hardness=in_batch)
        mine = own if mode == "in_batch_negatives" else harder
        lse = [
            similarity_logsumexp(queries, everything, SCALE, **others),
            torch.cat([positive[:, None], mine], 1).logsumexp(1),
        ]
    first = torch.stack(lse).logsumexp(0)
    more = []
    if "query_to_query" in directions:
        more.append(similarity_logsumexp(queries, queries, SCALE, query_ids=OWN))
    if "doc_to_query" in directions:
        more.append(similarity_logsumexp(docs[0], queries, SCALE))
    if "doc_to_doc" in directions:
        more.append(similarity_logsumexp(docs[0], everything, SCALE, query_ids=OWN, key_ids=of_query))
    every = torch.stack([first, *more])
    log_z = every.logsumexp(0) if partition == "joint" else every.mean(0)
    return (log_z - positive).mean()


@pytest.mark.parametrize("negatives", [0, 1, 3])
def test_ranking_in_every_direction(negatives):
    inputs = batch(negatives)
    for count in range(len(DIRECTIONS) + 1):
        for directions in itertools.combinations(DIRECTIONS, count):
            with named.case(directions):
                agree(*(functools.partial(f, directions=directions) for f in (ranking, dense_ranking)), *inputs)
    for directions in ((), ("doc_to_query",)):
        options = dict(directions=directions, partition="per_direction")
        agree(*(functools.partial(f, **options) for f in (ranking, dense_ranking)), *inputs)


@pytest.mark.parametrize("mode", ["in_batch_negatives", "hard_negatives", "all_negatives"])
def test_ranking_with_hardness(mode):
    for negatives, directions in itertools.product((0, 2), ((), DIRECTIONS)):
        options = dict(directions=directions, mode=mode, strength=9.0)
        with named.case(negatives, directions):
            agree(*(functools.partial(f, **options) for f in (ranking, dense_ranking)), *batch(negatives))


def test_ranking_is_infonce_where_it_has_one_denominator():
    """The usual direction, with hard negatives of all queries; both directions; hardness of all negatives."""
    queries, docs = batch(2)

    def one_way(queries, docs, **options):
        return infonce(queries, docs[0], SCALE, negatives=docs[1:].flatten(0, 1), symmetric=False, **options)

    agree(one_way, functools.partial(dense_ranking, directions=()), queries, docs)
    harder = dict(directions=(), mode="all_negatives", strength=5.0)
    agree(functools.partial(one_way, hardness=5.0), functools.partial(dense_ranking, **harder), queries, docs)
    both = dict(directions=("doc_to_query",), partition="per_direction")
    agree(lambda q, d: infonce(q, d[0], SCALE), functools.partial(dense_ranking, **both), queries, docs[:1])


# GISTEmbedLoss


def thresholds(guide_queries: Tensor, guide_docs: Tensor, margin: float, kind: str) -> Tensor:
    own = (guide_queries * guide_docs[0]).sum(1)
    return own - margin * (own.abs() if kind == "relative" else 1)


def dense_guided(queries, docs, guide_queries, guide_docs, margin, kind, anchors, positives):
    level = thresholds(guide_queries, guide_docs, margin, kind)[:, None]

    def scores(x: Tensor, y: Tensor, g: Tensor, h: Tensor, seen: Tensor | None = None) -> Tensor:
        above = g @ h.T > level
        return (x @ y.T).masked_fill(above if seen is None else above & ~seen, -torch.inf)

    eye = torch.eye(N, dtype=torch.bool)
    parts = [scores(queries, docs[0], guide_queries, guide_docs[0], eye)]
    if anchors:
        parts.append(scores(queries, queries, guide_queries, guide_queries))
    if positives:
        parts.append(scores(docs[0], docs[0], guide_docs[0], guide_docs[0]))
    parts += [scores(queries, y, guide_queries, h) for y, h in zip(docs[1:], guide_docs[1:], strict=True)]
    return F.cross_entropy(SCALE * torch.cat(parts, 1), OWN)


def guided(queries, docs, guide_queries, guide_docs, margin, kind, anchors, positives):
    """The same, without a matrix: a loss, from which its denominator is recovered, and two more sets of keys."""
    level = FalseNegatives(guide_queries, guide_docs[0], margin, kind)
    hard, guide_hard = (x[1:].flatten(0, 1) for x in (docs, guide_docs))
    positive = SCALE * (queries * docs[0]).sum(1)
    others = dict(query_ids=OWN, guide=(guide_queries, guide_docs[0]), thresholds=level)
    lse = [positive, similarity_logsumexp(queries, docs[0], SCALE, **others)]
    lse.append(similarity_logsumexp(queries, hard, SCALE, guide=(guide_queries, guide_hard), thresholds=level))
    if anchors:
        both = guide_queries, guide_queries
        lse.append(similarity_logsumexp(queries, queries, SCALE, guide=both, thresholds=level))
    if positives:
        both = guide_docs[0], guide_docs[0]
        lse.append(similarity_logsumexp(docs[0], docs[0], SCALE, guide=both, thresholds=level))
    return (torch.stack(lse).logsumexp(0) - positive).mean()


@pytest.mark.parametrize(("margin", "kind"), [(0.0, "absolute"), (0.1, "absolute"), (0.05, "relative")])
def test_guided(margin, kind):
    for negatives, anchors, positives in itertools.product((0, 2), (False, True), (False, True)):
        inputs = batch(negatives)
        guides = [F.normalize(x + 0.7 * drawn(*x.shape, seed=x.ndim + 3), dim=-1)[..., :9] for x in inputs]
        filtered = (guides[0] @ guides[1][0].T > thresholds(*guides, margin, kind)[:, None]).sum()
        assert filtered > N, "the filter has something to do"
        setting = dict(zip(("guide_queries", "guide_docs"), guides, strict=True), margin=margin, kind=kind)
        rest = dict(setting, anchors=anchors, positives=positives)
        with named.case(negatives, anchors, positives):
            agree(*(functools.partial(f, **rest) for f in (guided, dense_guided)), *inputs)
            if not anchors and not positives:
                one = functools.partial(one_call, **setting)
                agree(one, functools.partial(dense_guided, **rest), *inputs)


def one_call(queries, docs, guide_queries, guide_docs, margin, kind):
    """Without anchors and positives it is one call of infonce."""
    hard, guide_hard = (x[1:].flatten(0, 1) for x in (docs, guide_docs))
    filtered = FalseNegatives(guide_queries, guide_docs[0], margin, kind, guide_hard)
    return infonce(queries, docs[0], SCALE, negatives=hard, false_negatives=filtered, symmetric=False)
