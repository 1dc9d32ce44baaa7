"""How much of each part of a mixture is drawn: as the run says, on a ramp, or by what is learned from it. No torch.

Time is cut into windows of `every` steps, in which shares stay. Where they are measured, the same samples of every part
are asked before each window what they teach; this sets the shares of the window after it, whose batches nobody has
built yet.

| kind | a part is drawn more, the more | source |
|---|---|---|
| `fixed`, `ramp` | never: shares are the run's, or move from these to others | |
| `grad_norm` | a step on its samples alone would change the weights | arXiv:1704.03003, arXiv:1511.06481 |
| `progress` | its losses have fallen in a window, for each sample drawn | arXiv:1704.03003 |

Both are learning progress in the sense of Graves et al. 2017: `progress` is their prediction gain, over a window
instead of a step, as a part of the loss; `grad_norm` their gradient prediction gain, what a step is expected to gain,
for steps of a given length, as Adam's are (they take the square, for plain gradient descent). It is also the share with
which sampling has the least variance (Alain et al. 2015). Both are known for all parts, so that no bandit has to
explore: the shares are set in proportion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from mmkernels.pretrain.blending import blended, capped
from mmkernels.pretrain.windows import Windows

__all__ = ["MeasuredMix", "Mixing", "Taught"]

_MOST = 2.0  # times the share of the window before
Kind = Literal["fixed", "ramp", "grad_norm", "progress"]


@dataclass(frozen=True)
class Mixing:
    """How the shares of several data sets change, or follow what is measured."""

    kind: Kind = "fixed"
    """fixed: `data_weights`; ramp: from these `to` others; grad_norm: more of what has large gradients; progress: of
    what is learned fastest."""
    every: int = 50
    """Steps of a window, after which the shares change."""
    to: tuple[float, ...] | None = None
    """Of ramp: the shares at its end, one for each data set, which stay."""
    steps: int = 0
    """Of ramp: the step at which it ends; it begins with the run, and is linear."""
    samples: int = 64
    """Of the measured kinds: samples of each data set that are measured, always the same ones."""
    floor: float = 0.2
    """Of these: part of each share that stays as if it were fixed, so that no data set is forgotten."""
    alpha: float = 1.0
    """Of these: how strongly the shares follow, which are in proportion to what is measured, to this power."""
    decay: float = 0.5
    """Of these: how much of the running means of what is measured is left after a window."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"mixing.kind: expected one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        if self.kind == "ramp" and (self.to is None or self.steps < 1):
            raise ValueError(f"mixing.to, mixing.steps: expected shares and a step, got {self.to} and {self.steps}")
        if self.kind != "ramp" and (self.to is not None or self.steps):
            raise ValueError(f"mixing.to, mixing.steps: expected none unless kind is ramp, got {self.to}, {self.steps}")
        for name in ("every", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"mixing.{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 < self.floor <= 1:
            raise ValueError(f"mixing.floor: expected a share above 0, at most 1, got {self.floor}")
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"mixing.alpha: expected at least 0, got {self.alpha}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"mixing.decay: expected 0 <= decay < 1, got {self.decay}")

    @property
    def changes(self) -> bool:
        """Whether shares change from window to window."""
        return self.kind != "fixed"

    @property
    def measures(self) -> bool:
        """Whether shares depend on what is measured."""
        return self.kind not in ("fixed", "ramp")


class Taught(NamedTuple):
    """What the samples of a part have told."""

    losses: dict[str, float]  # of the objectives to which they say something; comparisons as parts of that of a guess
    norm: float = 0.0  # of the gradient, where it is measured


class MeasuredMix(Windows):
    """What has been measured so far, and the factors of the shares that follow; their mean, by the shares, is 1.

    A part that could not be measured the last time (no loss above 0, a gradient that is not finite) has no factor: its
    share is as it would be if it were fixed, and so are those of all if none gains. No other share more than doubles
    from one window to the next: what a part owes to others that are learned is not its own, and what was measured of
    few samples is not exact.

    Args:
        mixing: of the recipe.
        agreed: of factors as they came out on this rank those that all take: a last bit would draw other samples.
    """

    kept = ("window", "factors", "losses", "gains", "dealt")

    def __init__(self, mixing: Mixing, agreed: Callable[[list[float]], list[float]] = list) -> None:
        super().__init__(mixing.every, ahead=1)
        self.mixing, self._agreed = mixing, agreed
        self._window = -1  # so that the first measurement is before the first step
        self._losses: dict[str, dict[str, float]] = {}  # of each part when it was measured last
        self._gains: dict[str, float] = {}  # of each part, running means
        self._dealt: dict[str, float] = {}  # shares of each part, summed over the steps of this window

    def due(self, step: int) -> bool:
        """Whether to measure before a step."""
        return self.mixing.measures and step // self.every > self._window

    def count(self, shares: Mapping[str, float]) -> None:
        """Say what a step that is done has had of each part."""
        if self.mixing.measures:
            self._dealt = {part: self._dealt.get(part, 0.0) + share for part, share in shares.items()}

    def see(
        self, found: Mapping[str, Taught], weights: Mapping[str, float], usual: Mapping[str, float]
    ) -> dict[str, float]:
        """Take what was measured before a window; returns the gain of each part that could be measured.

        Args:
            found: of each part.
            weights: of the objectives at this time; all of them, if one a step is drawn.
            usual: the shares of all parts if they were fixed.
        """
        gains = {part: gain for part, told in found.items() if (gain := self._gain(part, told, weights)) is not None}
        self._losses |= {part: finite for part, told in found.items() if (finite := _finite(told.losses))}
        kept = self.mixing.decay
        self._gains = {
            part: kept * self._gains[part] + (1 - kept) * gain if part in self._gains else gain
            for part, gain in gains.items()
        }
        factors = self._new(usual) if self._gains else {}
        self._dealt = {}
        self._go_on(dict(zip(factors, self._agreed([*factors.values()]), strict=True)) if factors else {})
        return gains

    def _gain(self, part: str, told: Taught, weights: Mapping[str, float]) -> float | None:
        """What a part teaches; None: it could not be measured."""
        if self.mixing.kind == "grad_norm":
            return told.norm if told.losses and 0 <= told.norm < math.inf else None
        fall, dealt = _fall(self._losses.get(part, {}), told.losses, weights), self._dealt.get(part, 0.0)
        return fall * math.fsum(self._dealt.values()) / dealt if fall is not None and dealt > 0 else None

    def _new(self, usual: Mapping[str, float]) -> dict[str, float]:
        """Factors of the parts that have gains."""
        floor, largest = self.mixing.floor, max(self._gains.values())
        known = {part: usual[part] for part in self._gains}
        if largest == 0 or floor == 1:
            return dict.fromkeys(known, 1.0)
        factors = {part: (gain / largest) ** self.mixing.alpha for part, gain in self._gains.items()}
        before, total = blended(usual, self._factors[-1], floor), math.fsum(known.values())
        most = [_MOST * before[part] / total for part in known]
        shares = capped([*blended(known, factors, floor).values()], most)
        return {
            part: max(0.0, (share * total / known[part] - floor) / (1 - floor))
            for part, share in zip(known, shares, strict=True)
        }


def _finite(losses: Mapping[str, float]) -> dict[str, float]:
    return {name: loss for name, loss in losses.items() if math.isfinite(loss)}


def _fall(before: Mapping[str, float], now: Mapping[str, float], weights: Mapping[str, float]) -> float | None:
    """The logarithm of how many times smaller losses have become, the mean by weight, 0 if they have grown; None: it
    is not known.

    Args:
        before, now: losses of objectives; those that are above 0 in both count.
        weights: of the objectives.
    """
    both = [name for name in weights if 0 < before.get(name, 0.0) < math.inf and 0 < now.get(name, 0.0) < math.inf]
    if not both:
        return None
    total = math.fsum(weights[name] * math.log(before[name] / now[name]) for name in both)
    return max(0.0, total / math.fsum(weights[name] for name in both))
