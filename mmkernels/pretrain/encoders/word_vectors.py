"""Word vectors made once, from which words of the training texts occur together; nothing of them learns by gradients.

    p_ij = max(0, log(n_ij n / (n_i n_j)))    n_ij: texts with both tokens; n_i, n: sums over rows, over all
    vectors = U sqrt(S) of the largest singular values S of p, times a / (a + share of the token)

Source: Levy and Goldberg 2014, Neural Word Embedding as Implicit Matrix Factorization; the weights: Arora et al. 2017,
A Simple but Tough-to-Beat Baseline for Sentence Embeddings.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmkernels import PackedBatch
from mmkernels.pretrain.batch import Piece
from mmkernels.pretrain.encoders.base import EncoderModule, no_tokens, text_of
from mmkernels.pretrain.recipe import Facts
from mmkernels.pretrain.tokenizer import TextTokenizer

__all__ = ["WordVectors"]

_WEIGHT = 1e-3  # a
_ROUNDS = 6  # of subspace iteration
_SPARE = 16  # further columns, which make the wanted ones converge


@dataclass(frozen=True)
class WordVectors:
    """The frozen vectors of a text's tokens, as many numbers as the model is wide. With the stream's project="none",
    the mean over them is a target that the other stream learns to reach."""

    max_tokens: int = 64
    """Most tokens of a text; longer ones are cut."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens: expected at least 1, got {self.max_tokens}")

    @property
    def reads_text(self) -> bool:
        return True

    def prepare(self, values: Sequence[Any], tokenizer: TextTokenizer) -> list[Piece]:
        """Tokens [L] int64."""
        return [no_tokens() if value is None else Piece(torch.tensor(self._ids(value, tokenizer))) for value in values]

    def _ids(self, value: Any, tokenizer: TextTokenizer) -> list[int]:
        return list(tokenizer.encode(text_of(value))[: self.max_tokens])

    def length(self, value: Any, tokenizer: TextTokenizer) -> int:
        return 0 if value is None else len(self._ids(value, tokenizer))

    def build(self, facts: Facts) -> EncoderModule:
        return WordVectorsEncoder(facts)


class WordVectorsEncoder(EncoderModule):
    table: Tensor

    def __init__(self, facts: Facts) -> None:
        super().__init__()
        self.seed = facts.seed
        self.register_buffer("table", torch.zeros(facts.vocabulary, facts.shape.width))

    def learn(self, texts: Iterable[str], tokenizer: TextTokenizer) -> None:
        """Make the vectors. `Trainer` calls it before the first step, and a checkpoint keeps what it made.

        Args:
            texts: of the training data; tokens of one text occur together.
            tokenizer: of the run.
        """
        rows, columns, shares = [], [], torch.zeros(len(self.table), dtype=torch.float64)
        for text in texts:
            ids = torch.tensor(sorted(set(tokenizer.encode(text))), dtype=torch.int64)
            shares[ids] += 1
            rows.append(ids.repeat_interleave(len(ids)))
            columns.append(ids.repeat(len(ids)))
        if not rows:
            raise ValueError("texts: expected training texts to make word vectors of, got none")
        vocabulary, size = self.table.shape
        vectors = vectors_of(torch.stack([torch.cat(rows), torch.cat(columns)]), vocabulary, size, self.seed)
        weight = _WEIGHT / (_WEIGHT + shares / shares.sum().clamp(min=1))
        self.table.copy_(vectors * weight[:, None])

    def forward(self, batch: PackedBatch) -> Tensor:
        return self.table[batch.tokens]


def vectors_of(pairs: Tensor, vocabulary: int, size: int, seed: int) -> Tensor:
    """Factors of the positive pointwise mutual information of tokens.

    Args:
        pairs: int64 [2, n], pairs of tokens of one text, in both orders; a token with itself does not count.
        vocabulary, size: of the result.
        seed: of the first guess.

    Returns:
        float64 [vocabulary, size], the largest factors first, zeros where there are fewer.
    """
    pairs = pairs[:, pairs[0] != pairs[1]]
    ones = torch.ones(pairs.shape[1], dtype=torch.float64)
    together = torch.sparse_coo_tensor(pairs, ones, (vocabulary, vocabulary), check_invariants=True).coalesce()
    place, counts = together.indices(), together.values()
    alone = torch.zeros(vocabulary, dtype=torch.float64).index_add_(0, place[0], counts)
    information = (counts * counts.sum() / (alone[place[0]] * alone[place[1]])).log().clamp(min=0)
    matrix = torch.sparse_coo_tensor(place, information, together.shape, check_invariants=True)
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
