"""What stops a run or warns: Ctrl-C, a non-finite loss, a loss that stays at chance."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

__all__ = ["Interrupt", "LossWatch", "NotFiniteError", "StepGuard"]

_SETTLED = 20  # steps of a running mean of gradient norms, and before it counts


class NotFiniteError(RuntimeError):
    """The loss or the gradient became infinite or NaN; the message says where the previous state is saved."""


class Interrupt:
    """True once the user has asked the run to stop.

    Inside `listening`, the first Ctrl-C (or SIGTERM) only sets this, so that the step finishes and is saved; the second
    has its usual effect. Only the main thread can listen; other threads are unaffected.
    """

    def __init__(self) -> None:
        self.number = 0  # of the signal

    def __bool__(self) -> bool:
        return self.number != 0

    @contextmanager
    def listening(self) -> Iterator[Interrupt]:
        numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        previous = {number: signal.getsignal(number) for number in numbers}

        def request(number: int, frame: FrameType | None) -> None:
            self.number = number
            for each, handler in previous.items():
                signal.signal(each, handler)

        for number in previous:
            signal.signal(number, request)
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


class LossWatch:
    """Warn once if the loss has stayed at chance.

    Args:
        patience: steps of the running mean, and steps before the first check.
        margin: relative distance from chance that counts as chance.
    """

    def __init__(self, patience: int = 100, margin: float = 0.02) -> None:
        self.patience, self.margin = patience, margin
        self._steps, self._mean, self._said = 0, 0.0, False

    def see(self, loss: float, chance_loss: float) -> str | None:
        """A warning, or None. `chance_loss` is the loss of a random guess."""
        ratio = loss / chance_loss if chance_loss > 0 else 0.0
        self._steps += 1
        self._mean += (ratio - self._mean) / min(self._steps, self.patience)
        if self._said or self._steps < self.patience or self._mean < 1 - self.margin:
            return None
        self._said = True
        return (
            f"the loss has stayed at {loss:.3f} for {self._steps} steps; chance is {chance_loss:.3f}. "
            "Try a lower --lr or a longer --warmup, and check that the captions match their images"
        )


class StepGuard:
    """Decides which steps must not update the weights.

    Args:
        allowed: steps that may be skipped in the whole run.
        spike: a gradient norm above this many times its running mean is a fault; 0: none is.
    """

    def __init__(self, allowed: int, spike: float) -> None:
        self.allowed, self.spike = allowed, spike
        self.skipped, self._seen, self._mean = 0, 0, 0.0

    def fault(self, loss: float, norm: float) -> str:
        """Why a step must not be taken; empty if it may."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"the loss is {loss} and the gradient norm {norm}"
        if self.spike and self._seen >= _SETTLED and norm > self.spike * self._mean:
            return f"the gradient norm is {norm:.4g}, {norm / self._mean:.1f} times its running mean"
        self._seen += 1
        self._mean += (norm - self._mean) / min(self._seen, _SETTLED)
        return ""

    def may_skip(self) -> bool:
        """Count a skipped step; False if it is one too many."""
        if self.skipped >= self.allowed:
            return False
        self.skipped += 1
        return True

    def state_dict(self) -> dict[str, float]:
        return {"skipped": self.skipped, "seen": self._seen, "mean": self._mean}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.skipped, self._seen, self._mean = int(state["skipped"]), int(state["seen"]), float(state["mean"])
