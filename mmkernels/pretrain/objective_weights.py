"""The weights of a run's objectives, step by step, and the gradients that a policy sets them by."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels.pretrain.policies import Measured
from mmkernels.pretrain.recipe import Recipe
from mmkernels.pretrain.schedule import check_policy, drawn, in_use, shares_at

__all__ = ["ObjectiveWeights", "squared_gradients"]


class ObjectiveWeights:
    """What `schedule.py` says of the weights, asked with what the recipe's policy has measured.

    A step begins with `begin`; its loss runs through `measuring`; `tell` takes what all ranks have found, which counts
    once the weights are updated, in `count`.

    Args:
        recipe, seed, workers: of the run.

    Attributes:
        squares: objective -> squared norm of its gradient on this rank, of those that this step has measured.
        shown: NAME/weight -> weight of each objective in this step, before one is drawn; empty for fixed weights.

    Raises:
        ValueError: as `check_policy`.
    """

    def __init__(self, recipe: Recipe, seed: int, workers: int) -> None:
        check_policy(recipe, workers)
        self.recipe, self.seed = recipe, seed
        self.squares: dict[str, float] = {}
        self.shown: dict[str, float] = {}
        self._measured = Measured(recipe.policy, ahead=int(recipe.draw))
        self._wanted: list[str] = []
        self._told: tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, float]] = {}, {}, {}

    def in_use(self, step: int) -> frozenset[str]:
        """The objectives in use at a step, which may be ahead of the run by as much as workers read."""
        factors = self._measured.factors(step) if self.recipe.draw else None
        return in_use(self.recipe, self.seed, step, factors)

    def begin(self, step: int) -> dict[str, float]:
        """The weights of the objectives in use at a step."""
        shares = shares_at(self.recipe, step, self._measured.factors(step))
        weights = drawn(self.recipe, self.seed, step, shares)
        measures = self.recipe.policy.measures
        self.shown = {f"{name}/weight": share for name, share in shares.items()} if measures else {}
        self._wanted, self.squares, self._told = self._measured.wanted(list(weights)), {}, ({}, {}, {})
        return weights

    @property
    def measures(self) -> bool:
        """Whether this step measures gradients."""
        return bool(self._wanted)

    def measuring(self, loss: Callable[..., Any]) -> Callable[..., Any]:
        """A loss of the streams' rows, (total, parts), that also sets `squares`."""

        def of_rows(*rows: Tensor) -> Any:
            if self._wanted:  # those of frozen encoders, too: a stage must not change what is measured
                rows = tuple(each if each.requires_grad else each.detach().requires_grad_() for each in rows)
            total, parts = loss(*rows)
            self.squares = squared_gradients({name: parts[name] for name in self._wanted if name in parts}, rows)
            return total, {name: part.detach() for name, part in parts.items()}

        return of_rows

    def tell(
        self,
        losses: Mapping[str, float],
        chances: Mapping[str, float | None],
        squares: Mapping[str, float],
        ranks: int,
    ) -> None:
        """Say what the step has come to.

        Args:
            losses: of the objectives that it tells anything, over all ranks.
            chances: the losses of a guess, of those that compare embeddings: they grow with the batch and a queue.
            squares: squared norms of these objectives' gradients, summed over the ranks; 0 where none was measured.
            ranks: W. A rank's gradient is of its part of the loss, W times too large.
        """
        norms = {name: math.sqrt(squares[name]) / ranks for name in self._wanted if name in squares}
        self._told = losses, chances, norms

    def count(self, steps: int, skipped: bool = False) -> None:
        """A step is done; a skipped one has told nothing."""
        if not skipped:
            self._measured.see(*self._told)
        self._measured.done(steps)

    def state_dict(self) -> dict[str, Any]:
        """JSON values: what a checkpoint keeps; empty for fixed weights."""
        state = self._measured.state_dict()
        return {"policy": state} if state else {}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """From the values of a checkpoint."""
        self._measured.load_state_dict(values.get("policy", {}))


def squared_gradients(losses: Mapping[str, Tensor], rows: Sequence[Tensor]) -> dict[str, float]:
    """The squared norm of each loss's gradient by what the encoders return, which all objectives read.

    The norm of its gradient by the encoders' parameters is at most this norm times that of the encoders' Jacobian,
    whichever loss it is (Sener and Koltun 2018, arXiv:1810.04650, section 3.3). So no backward through the encoders is
    needed, only one through the fusion and the heads for each loss.

    Args:
        losses: scalars with a graph, which is kept.
        rows: of the streams, [T, C] or [S, E], which need gradients.
    """
    found: dict[str, float] = {}
    for name, loss in losses.items():
        with torch.autocast(loss.device.type, enabled=False):
            grads = torch.autograd.grad(loss, rows, retain_graph=True, allow_unused=True)
        squares = [grad.double().square().sum() for grad in grads if grad is not None]
        found[name] = float(torch.stack(squares).sum()) if squares else 0.0
    return found
