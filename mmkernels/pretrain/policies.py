"""Policies: objective weights that follow what is measured while training. No torch.

A policy gives each objective a factor of the recipe's own weight, the prior; `schedule.weights_at` applies it. Time is
cut into windows of `every` steps: what a window has measured changes the weights of the next one, or, where one
objective a step is drawn and workers may have built the batches of the next window already, of the one after it.

| kind | an objective weighs more | source |
|---|---|---|
| `fixed` | never: weights are the recipe's, with its ramps | |
| `grad_norm` | whose gradient is small, or whose loss has fallen less than that of others | arXiv:1711.02257 |
| `progress` | whose loss falls more slowly than that of others | arXiv:1803.10704 |

`grad_norm` (Chen et al. 2018) sets the weights at which each weighted gradient has the norm that GradNorm aims at;
GradNorm itself takes a gradient step towards them; running means over windows take the place of its learning rate.
`progress` (Liu et al. 2019) is their dynamic weight average, over windows instead of epochs. Both look at losses as
parts of the objective's first loss; where embeddings of a batch are compared, of the loss at chance, which grows with a
queue.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from mmkernels.pretrain.blending import blended
from mmkernels.pretrain.windows import Windows

__all__ = ["Measured", "Policy", "log_grad_norm", "log_progress", "weighed"]

Kind = Literal["fixed", "grad_norm", "progress"]


@dataclass(frozen=True)
class Policy:
    """How the weights of several objectives follow what is measured; with `draw`, the odds of each."""

    kind: Kind = "fixed"
    """fixed: the recipe's weights; grad_norm: balanced gradients; progress: more for losses that fall more slowly."""
    every: int = 20
    """Steps of a window, after which the weights change."""
    floor: float = 0.1
    """Share of each weight that stays the recipe's, so that no objective starves."""
    alpha: float = 1.5
    """Of grad_norm: how much more an objective weighs that lags behind; 0: gradients of equal norm."""
    decay: float = 0.5
    """Of grad_norm: how much of the running means of norms and losses is left after a window."""
    temperature: float = 2.0
    """Of progress: the larger, the more even the weights."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"policy.kind: expected one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        if self.every < 1:
            raise ValueError(f"policy.every: expected at least 1 step, got {self.every}")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"policy.floor: expected a share between 0 and 1, got {self.floor}")
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"policy.alpha: expected at least 0, got {self.alpha}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"policy.decay: expected 0 <= decay < 1, got {self.decay}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"policy.temperature: expected a positive number, got {self.temperature}")

    @property
    def measures(self) -> bool:
        """Whether weights depend on what is measured."""
        return self.kind != "fixed"


def log_grad_norm(norm: float, left: float, alpha: float) -> float:
    """Logarithm of left ** alpha / norm: weighted by this, gradients are in the proportion that GradNorm aims at.

    Args:
        norm: of the objective's gradient, not weighted; above 0.
        left: its loss, as a part of what it was in the beginning; above 0.
        alpha: strength of the pull towards equal rates of training.
    """
    return alpha * math.log(left) - math.log(norm)


def log_progress(left: float, before: float, temperature: float) -> float:
    """Logarithm of exp(left / before / temperature), the factor of dynamic weight averaging.

    Args:
        left, before: the objective's mean loss in a window and in the one before; above 0.
        temperature: softens the differences.
    """
    return left / before / temperature


class Measured(Windows):
    """What a policy has measured so far, and the factors of the weights that follow; the same on all ranks.

    Losses that are not above 0 and norms that are 0 or not finite tell nothing: their objective keeps the factor that
    it had, or the recipe's weight.

    Args:
        policy: of the recipe.
        ahead: windows between a measurement and the window that it changes: 0, or 1 if batches are built ahead.
    """

    kept = ("window", "factors", "sums", "norms", "first", "means")

    def __init__(self, policy: Policy, ahead: int = 0) -> None:
        super().__init__(policy.every, ahead)
        self.policy = policy
        self._sums: dict[str, list[float]] = {}  # objective -> relative loss, summed over this window, and its steps
        self._norms: dict[str, float] = {}  # those measured in this window
        self._first: dict[str, float] = {}  # loss at its first step of each that is compared with it
        self._means: dict[str, list[float]] = {}  # grad_norm: norm, relative loss; progress: relative loss

    def factors(self, step: int) -> Mapping[str, float]:
        """Objective -> logarithm of the factor of its weight at a step, up to a constant; those left out have none yet.
        Raises as `Windows.factors` does."""
        return super().factors(step) if self.policy.measures else {}

    def wanted(self, names: Sequence[str]) -> list[str]:
        """Of some objectives those whose gradient is to be measured: once in a window, when there is one."""
        return [name for name in names if name not in self._norms] if self.policy.kind == "grad_norm" else []

    def see(self, losses: Mapping[str, float], chances: Mapping[str, float | None], norms: Mapping[str, float]) -> None:
        """Take what a step that has updated the weights tells.

        Args:
            losses: of the objectives to which it said something.
            chances: the losses of a guess, of those that are to be compared with them.
            norms: of the gradients that were measured.
        """
        if not self.policy.measures:
            return
        for name, loss in losses.items():
            if loss > 0:
                left = loss / (chances.get(name) or self._first.setdefault(name, loss))
                total = self._sums.setdefault(name, [0.0, 0])
                total[0], total[1] = total[0] + left, total[1] + 1
        self._norms |= norms

    def done(self, steps: int) -> None:
        """Say how many steps of the run are done, after each: at the end of a window the weights change."""
        if self.policy.measures and steps % self.policy.every == 0:
            self._go_on(self._new())
            self._sums, self._norms = {}, {}

    def _new(self) -> dict[str, float]:
        policy, found = self.policy, dict(self._factors[-1])
        for name, (total, count) in self._sums.items():
            now, before = [total / count], self._means.get(name)
            if policy.kind == "progress":
                if before is not None:
                    found[name] = log_progress(now[0], before[0], policy.temperature)
            elif 0 < self._norms.get(name, 0.0) < math.inf:
                now = [self._norms[name], *now]
                if before is not None:
                    now = [policy.decay * old + (1 - policy.decay) * new for old, new in zip(before, now, strict=True)]
                found[name] = log_grad_norm(now[0], now[1], policy.alpha)
            else:
                continue
            self._means[name] = now
        return found

    def state_dict(self) -> dict[str, Any]:
        """All of it, as JSON values; empty where nothing is measured."""
        return super().state_dict() if self.policy.measures else {}


def weighed(weights: Mapping[str, float], factors: Mapping[str, float], floor: float) -> dict[str, float]:
    """`blended`, of factors given by their logarithms."""
    known = [name for name in weights if name in factors]
    largest = max((factors[name] for name in known), default=0.0)  # so that nothing overflows
    return blended(weights, {name: math.exp(factors[name] - largest) for name in known}, floor)
