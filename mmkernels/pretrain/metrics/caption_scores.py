"""CIDEr, ROUGE-L and BLEU of captions, over the same words, each beside that of one caption for all samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from mmkernels.pretrain.metrics.cider import Cider, words
from mmkernels.pretrain.metrics.figure import Figure

__all__ = ["NEEDS", "SCORES", "CaptionScores"]

SCORES = ("CIDEr", "ROUGE-L", "BLEU-4")
NEEDS: Mapping[str, str] = {"ROUGE-L": "rouge_score", "BLEU-4": "sacrebleu"}
"""The packages that compute scores, by import name."""


class CaptionScores:
    """Scores of captions of N samples.

    Args:
        references: what is right to say, at least one text for each sample.
        constant: the caption that says the same of all, which knows nothing of them.
        clusters: int [N]: samples with the same number are drawn together for the intervals.
        scores: some of SCORES.
    """

    def __init__(
        self,
        references: Sequence[Sequence[str]],
        constant: str,
        clusters: Sequence[int],
        scores: Sequence[str] = SCORES,
    ) -> None:
        self.references, self.clusters = references, np.asarray(clusters)
        self._sums: dict[str, tuple[Callable[[Sequence[str]], np.ndarray], Any]] = {}
        for score in scores:
            if score == "CIDEr":
                self._sums[score] = _of_each(Cider(references).each), _mean
            elif score == "ROUGE-L":
                self._sums[score] = _of_each(partial(_rouge, references)), _mean
            else:
                self._sums[score] = partial(_bleu_counts, references), _bleu
        every = [constant] * len(references)
        self._chance = {score: float(of(sums(every).sum(0)[None])[0]) for score, (sums, of) in self._sums.items()}

    def figures(self, texts: Sequence[str], before: str, after: str = "", headline: str = "") -> list[Figure]:
        """A figure for each score.

        Args:
            texts: N captions.
            before, after: of the score's name in that of the figure.
            headline: the score whose figure is one.
        """
        return [
            Figure.of_sums(
                f"{before}{score}{after}",
                sums(texts),
                of,
                self._chance[score],
                clusters=self.clusters,
                percent=score != "CIDEr",
                headline=score == headline,
            )
            for score, (sums, of) in self._sums.items()
        ]


class _Words:
    """What rouge-score calls a tokenizer."""

    tokenize = staticmethod(words)


def _of_each(values: Callable[[Sequence[str]], Any]) -> Callable[[Sequence[str]], np.ndarray]:
    """[N, 2]: a value of each sample, and 1: for a mean."""
    return lambda texts: np.stack([np.asarray(values(texts), np.float64), np.ones(len(texts))], 1)


def _mean(sums: np.ndarray) -> np.ndarray:
    mean: np.ndarray = sums[:, 0] / sums[:, 1]
    return mean


def _rouge(references: Sequence[Sequence[str]], texts: Sequence[str]) -> list[float]:
    """F1 of the longest common subsequence, with the reference where it is highest."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    found = (scorer.score_multi(each, text) for each, text in zip(references, texts, strict=True))
    return [score["rougeL"].fmeasure for score in found]


def _bleu_counts(references: Sequence[Sequence[str]], texts: Sequence[str]) -> np.ndarray:
    """[N, 10]: n-grams of each text that are right, n-grams, words, words of the reference nearest in length."""
    from sacrebleu.metrics import BLEU

    scorer = BLEU(tokenize="none", effective_order=True)
    plain = (" ".join(words(text)) for text in texts)
    found = (
        scorer.sentence_score(text, [" ".join(words(r)) for r in each])
        for each, text in zip(references, plain, strict=True)
    )
    return np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in found], np.float64).reshape(len(texts), 10)


def _bleu(sums: np.ndarray) -> np.ndarray:
    """Of the whole set, in [0, 1]."""
    from sacrebleu.metrics import BLEU

    rows = sums.astype(np.int64).tolist()
    scores = (BLEU.compute_bleu(row[:4], row[4:8], row[8], row[9], smooth_method="exp").score for row in rows)
    return np.array([score / 100 for score in scores])
