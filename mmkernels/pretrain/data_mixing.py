"""The shares of a run's data sets, window by window, and the samples that tell what each teaches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mmkernels.pretrain.blending import blended
from mmkernels.pretrain.config import Config
from mmkernels.pretrain.data import Source
from mmkernels.pretrain.data.spaced import spaced
from mmkernels.pretrain.mixing import MeasuredMix, Taught
from mmkernels.pretrain.ranks import Ranks
from mmkernels.pretrain.recipe import Recipe
from mmkernels.pretrain.schedule import check_mixing, data_shares, shares_at

__all__ = ["DataMixing"]


class DataMixing:
    """The shares that `schedule.py` says, with what the recipe's mixing has measured.

    Args:
        config, recipe: of the run.
        source: the training data.
        ranks: who train together.

    Attributes:
        probes: int64 [n] of each part: the samples that are measured, of different concepts; empty if none are.
        found: of the last measurement NAME/gain of each part that it could measure, and mixing_seconds.

    Raises:
        ValueError: as `check_mixing`.
    """

    def __init__(self, config: Config, recipe: Recipe, source: Source, ranks: Ranks) -> None:
        parts = source.shares
        self.names: tuple[str, ...] = () if parts is None else parts.names
        self.sizes: tuple[int, ...] = () if parts is None else parts.sizes
        check_mixing(recipe, self.names, config.workers)
        self.recipe, self.weights = recipe, config.data_weights or self.sizes
        self.found: dict[str, float] = {}
        self._mix: dict[str, float] = {}  # of the last batch
        self._silent: list[str] = []
        self._said: set[str] = set()
        self._measured = MeasuredMix(
            recipe.mixing, lambda values: ranks.of_rank_0(torch.tensor(values, dtype=torch.float64)).tolist()
        )
        self.probes = self._probes(source.concepts, recipe.mixing.samples) if recipe.mixing.measures else {}

    def _probes(self, concepts: np.ndarray, most: int) -> dict[str, np.ndarray]:
        found, start = {}, 0
        for name, size in zip(self.names, self.sizes, strict=True):
            _, first = np.unique(concepts[start : start + size], return_index=True)
            different = start + np.sort(first)
            found[name] = different[spaced(len(different), most)]
            start += size
        return found

    def shares_at(self, step: int) -> list[float]:
        """The share of each part at a step, which may be ahead of the run by as much as workers read. They add up to
        1; those that batches cannot have are bounded where these are dealt."""
        prior = data_shares(self.recipe, step, self.weights)
        if not self.recipe.mixing.measures:
            return prior
        of = dict(zip(self.names, prior, strict=True))
        return [*blended(of, self._measured.factors(step), self.recipe.mixing.floor).values()]

    def due(self, step: int) -> bool:
        """Whether to measure before a step."""
        return self._measured.due(step)

    def objectives(self, step: int) -> list[tuple[float, dict[str, float]]]:
        """What to measure of each part: (odds, weights of objectives), one objective at a time if they are drawn."""
        weights = shares_at(self.recipe, step)  # not a policy's: losses must be comparable
        if not self.recipe.draw:
            return [(1.0, weights)]
        return [(weight / sum(weights.values()), {name: 1.0}) for name, weight in weights.items()]

    def see(self, step: int, found: Mapping[str, Taught], seconds: float) -> None:
        """Take what was measured before a step, and how long that took."""
        usual = dict(zip(self.names, data_shares(self.recipe, step, self.weights), strict=True))
        gains = self._measured.see(found, shares_at(self.recipe, step), usual)
        self.found = {**{f"{name}/gain": gain for name, gain in gains.items()}, "mixing_seconds": seconds}
        if self.recipe.mixing.kind == "grad_norm" or step:  # a fall takes two measurements
            self._silent = [name for name in self.names if name not in gains]

    def shown(self, mix: Sequence[float] | None) -> dict[str, float]:
        """For the log: NAME/share of each part in a batch, of the sampler's; and what was measured since the last."""
        self._mix = dict(zip(self.names, mix, strict=True)) if mix else {}
        return {f"{name}/share": share for name, share in self._mix.items()} | self.found

    def count(self, skipped: bool = False) -> None:
        """A step is done; a skipped one is not in the log."""
        self._measured.count(self._mix)
        self.found = self.found if skipped else {}

    def warning(self) -> str:
        """What to say, once, of parts that the last measurement could not measure; empty: nothing."""
        names, self._silent = [name for name in self._silent if name not in self._said], []
        self._said.update(names)
        if not names:
            return ""
        return (
            f"mixing: of {', '.join(names)} nothing could be measured: too few samples, or no loss to compare. The "
            "share of such a data set is as if it were fixed"
        )

    def state_dict(self) -> dict[str, Any]:
        """JSON values: what a checkpoint keeps; empty where nothing is measured."""
        return {"mixing": self._measured.state_dict()} if self.recipe.mixing.measures else {}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """From the values of a checkpoint."""
        self._measured.load_state_dict(values.get("mixing", {}))
