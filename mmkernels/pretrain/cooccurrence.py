"""Vectors of words, made of which of them occur together in texts.

    p_ij = max(0, log(n_ij n / (n_i n_j)))    n_ij: texts with both tokens; n_i, n: sums over rows, over all
    vectors = U sqrt(S) of the largest singular values S of p

Source: Levy and Goldberg 2014, Neural Word Embedding as Implicit Matrix Factorization.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["together", "vectors_of"]

_PAIRS = 1 << 22  # that are held before they are counted
_ROUNDS = 6  # of subspace iteration
_SPARE = 16  # further columns, which make the wanted ones converge


def together(texts: Iterable[Sequence[int]], vocabulary: int) -> Tensor:
    """How many texts have both of two tokens.

    Args:
        texts: their tokens, each once.
        vocabulary: number of tokens that there are.

    Returns:
        sparse float64 [vocabulary, vocabulary], coalesced; a token has no company in itself.

    Raises:
        ValueError: there is no text.
    """
    found: list[Tensor] = []
    counts, waiting, none = _counted(found, vocabulary), 0, True
    for text in texts:
        ids, none = torch.tensor(text, dtype=torch.int64), False
        found.append(torch.stack([ids.repeat_interleave(len(ids)), ids.repeat(len(ids))]))
        waiting += len(ids) ** 2
        if waiting > _PAIRS:
            counts, found, waiting = (counts + _counted(found, vocabulary)).coalesce(), [], 0
    if none:
        raise ValueError("texts: expected training texts to make word vectors of, got none")
    return (counts + _counted(found, vocabulary)).coalesce()


def _counted(found: list[Tensor], vocabulary: int) -> Tensor:
    pairs = torch.cat([torch.empty((2, 0), dtype=torch.int64), *found], dim=1)
    pairs = pairs[:, pairs[0] != pairs[1]]
    ones = torch.ones(pairs.shape[1], dtype=torch.float64)
    return torch.sparse_coo_tensor(pairs, ones, (vocabulary, vocabulary), check_invariants=True).coalesce()


def vectors_of(counts: Tensor, size: int, seed: int) -> Tensor:
    """Factors of the positive pointwise mutual information of tokens.

    Args:
        counts: sparse, of `together`.
        size: numbers of a vector.
        seed: of the first guess.

    Returns:
        float64 [vocabulary, size], the largest factors first, zeros where there are fewer.
    """
    vocabulary = len(counts)
    place, counted = counts.indices(), counts.values()
    alone = torch.zeros(vocabulary, dtype=torch.float64).index_add_(0, place[0], counted)
    information = (counted * counted.sum() / (alone[place[0]] * alone[place[1]])).log().clamp(min=0)
    matrix = torch.sparse_coo_tensor(place, information, counts.shape, check_invariants=True)
    generator = torch.Generator().manual_seed(seed % 2**63)
    basis = torch.randn(vocabulary, min(size + _SPARE, vocabulary), generator=generator, dtype=torch.float64)
    for _ in range(_ROUNDS):  # towards the largest singular values; the matrix is symmetric
        basis = torch.linalg.qr(torch.sparse.mm(matrix, basis)).Q
    values, within = torch.linalg.eigh(basis.T @ torch.sparse.mm(matrix, basis))
    best = values.abs().argsort(descending=True)[:size]
    values, vectors = values.abs()[best], (basis @ within)[:, best]
    found = torch.zeros(vocabulary, size, dtype=torch.float64)
    found[:, : len(values)] = vectors * values.sqrt()
    return found
