"""The work that a sample is for a recipe's model, in flop of a forward pass: what batches are dealt to ranks by."""

from __future__ import annotations

import numpy as np

from mmkernels import EncoderCost
from mmkernels.pretrain.recipe import Recipe

__all__ = ["workload"]


def workload(recipe: Recipe, lengths: np.ndarray) -> np.ndarray:
    """float64 [n]: the work of each of n samples, its encoders' and its fusion's.

    Args:
        recipe: of the model. An encoder or a fusion that does not say how many layers it has counts as one of one.
        lengths: int64 [n, streams]: tokens of each sample in each stream.
    """
    total = np.zeros(len(lengths))
    for i, stream in enumerate(recipe.streams.values()):
        total += _work(recipe.model.width, getattr(stream.encoder, "layers", 1), lengths[:, i])
    if recipe.fusion is not None:
        total += _work(recipe.model.width, getattr(recipe.fusion, "layers", 1), lengths.sum(1))
    return total


def _work(width: int, layers: object, tokens: np.ndarray) -> np.ndarray:
    into = 4.0 * width * width * tokens  # from values to features, and from these to what is predicted
    if not isinstance(layers, int) or layers < 1:
        return into
    return into + EncoderCost.transformer(width, layers).of_items(tokens)
