"""What holds when: values that move with the step, and the stages of a run."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Ramp", "Stage"]


@dataclass(frozen=True)
class Ramp:
    """A value that moves linearly from `start` to `end` during the first `steps` steps."""

    start: float
    end: float
    steps: int


@dataclass(frozen=True)
class Stage:
    """What holds until a step; the first stage that has not ended applies."""

    until: int | None = None
    """First step of the next stage; None: to the end."""
    trainable: tuple[str, ...] = ("*",)
    """Patterns of the names of parameters that learn; those of a pattern that begins with "!" do not."""
    lr_scale: float = 1.0
    """Factor of the learning rate."""
    objectives: tuple[str, ...] | None = None
    """Those in use; None: all."""
    fusion_depth: int | None = None
    """Fusion layers in use; None: all."""
    batch: int | None = None
    """Samples per step; None: the run's `batch`."""
    tokens: int | None = None
    """Tokens per step, of runs with `tokens`; None: as many as these."""
    chunk: int | None = None
    """Samples in memory at a time; None: the run's `chunk`."""
    data_weights: tuple[float, ...] | None = None
    """How much of each part of a mixture is drawn; None: as the run says."""

    @property
    def sampling(self) -> tuple[object, ...]:
        """What decides how samples are drawn: a stage that changes it begins a new epoch."""
        return self.batch, self.tokens, self.data_weights
