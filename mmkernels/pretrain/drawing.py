"""Which samples make up the batches of a run: by number or by tokens, from the parts of a mixture, stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mmkernels.pretrain.config import Config
from mmkernels.pretrain.data import BatchSampler, Collator, Source, StagedSampler, TokenSampler, WindowedSampler
from mmkernels.pretrain.data.shares import Shares
from mmkernels.pretrain.ranks import Ranks
from mmkernels.pretrain.recipe import Recipe
from mmkernels.pretrain.schedule import samplings

__all__ = ["sampler_of"]


def sampler_of(
    config: Config,
    recipe: Recipe,
    source: Source,
    collator: Collator,
    ranks: Ranks,
    shares_at: Callable[[int], Sequence[float]],
) -> BatchSampler | TokenSampler | WindowedSampler | StagedSampler:
    """The batches of a run.

    Args:
        config, recipe, ranks: of the run.
        source: the training data.
        collator: knows the lengths of samples.
        shares_at: step -> the shares of a mixture's parts, where they change.

    Raises:
        ValueError: the data or the ranks do not allow a batch of a stage.
    """
    concepts = _concepts(recipe, source) if config.tokens is None else None
    lengths = None if config.tokens is None else collator.lengths(source)
    parts: list[tuple[int | None, BatchSampler | TokenSampler | WindowedSampler]] = []
    for until, i in samplings(recipe, (config.batch, config.tokens, config.data_weights)):
        try:
            one = _of_stage(config, recipe, i, source, concepts, lengths, ranks)
            changes, every = recipe.mixing.changes, recipe.mixing.every
            parts.append((until, WindowedSampler(one, shares_at, every) if changes else one))
        except ValueError as error:
            own = any(each is not None for each in recipe.stages[i].sampling)
            raise (ValueError(f"stages[{i}]: {error}") if own else error) from None
    return parts[0][1] if len(parts) == 1 else StagedSampler(parts)


def _concepts(recipe: Recipe, source: Source) -> np.ndarray:
    distinct = any(getattr(part, "by_concept", False) for part in recipe.objectives.values())
    return source.concepts if distinct else np.arange(len(source))


def _of_stage(
    config: Config,
    recipe: Recipe,
    number: int,
    source: Source,
    concepts: np.ndarray | None,
    lengths: np.ndarray | None,
    ranks: Ranks,
) -> BatchSampler | TokenSampler:
    stage = recipe.stages[number]
    batch = config.batch if stage.batch is None else stage.batch
    shares = source.shares if stage.data_weights is None else _weighted(source.shares, stage.data_weights)
    if concepts is not None:
        if stage.tokens is not None:
            raise ValueError(f"tokens: expected None in a run without --tokens, got {stage.tokens}")
        if batch < ranks.size:
            raise ValueError(f"batch: expected at least a sample for each of {ranks.size} ranks, got {batch}")
        return BatchSampler(concepts, batch, config.seed, shares)
    assert lengths is not None
    tokens = config.tokens if stage.tokens is None else stage.tokens
    return TokenSampler(lengths, tokens, max_samples=batch, seed=config.seed, shares=shares)  # type: ignore[arg-type]


def _weighted(shares: Shares | None, weights: Sequence[float]) -> Shares:
    if shares is None:
        raise ValueError(f"data_weights: expected None, since the data are no mixture, got {weights}")
    return Shares(shares.names, shares.sizes, weights)
