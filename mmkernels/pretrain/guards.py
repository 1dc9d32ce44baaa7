"""What stops a run, or should: Ctrl-C, a loss that is not finite, a loss that does not move."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Interrupt", "LossWatch", "NotFiniteError"]


class NotFiniteError(RuntimeError):
    """The loss or the gradient became infinite or NaN; the message says where the state before it was saved."""


class Interrupt:
    """True once somebody asked the run to stop.

    Inside `listening`, the first Ctrl-C (or SIGTERM) only sets this, so that the step is finished and saved; the second
    acts as ever. Only the main thread can listen; in another one nothing changes.
    """

    def __init__(self) -> None:
        self.requested = False

    def __bool__(self) -> bool:
        return self.requested

    @contextmanager
    def listening(self) -> Iterator[Interrupt]:
        numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        previous = {number: signal.getsignal(number) for number in numbers}

        def request(number: int, frame: FrameType | None) -> None:
            self.requested = True
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
    """Says once when the loss has stayed at chance.

    Args:
        patience: steps of the running mean, and steps before the first look.
        margin: how near to chance still counts as chance.
    """

    def __init__(self, patience: int = 100, margin: float = 0.02) -> None:
        self.patience, self.margin = patience, margin
        self._steps, self._mean, self._said = 0, 0.0, False

    def see(self, loss: float, chance_loss: float) -> str | None:
        """A warning, or None. `chance_loss`: the loss of a model that knows nothing."""
        ratio = loss / chance_loss if chance_loss > 0 else 0.0
        self._steps += 1
        self._mean += (ratio - self._mean) / min(self._steps, self.patience)
        if self._said or self._steps < self.patience or self._mean < 1 - self.margin:
            return None
        self._said = True
        return (
            f"the loss has stayed at {loss:.3f} for {self._steps} steps; knowing nothing gives {chance_loss:.3f}. "
            "Try a lower --lr or a longer --warmup, and check that captions belong to their images"
        )
