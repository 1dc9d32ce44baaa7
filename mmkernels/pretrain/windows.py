"""Factors that change from one window of steps to the next, known as far ahead as batches are built. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["Windows"]


class Windows:
    """The factors of the window that a run is in and of those after it, and the state that they follow from.

    Args:
        every: steps of a window.
        ahead: windows between a measurement and the one that it changes.
    """

    kept: tuple[str, ...] = ("window", "factors")
    """What a state has: the names of private attributes, JSON values, without the underscore."""

    def __init__(self, every: int, ahead: int) -> None:
        self.every = every
        self._window = 0
        self._factors: list[dict[str, float]] = [{} for _ in range(1 + ahead)]  # of this window and those after it

    def factors(self, step: int) -> Mapping[str, float]:
        """Name -> factor at a step; those left out have none yet.

        Raises:
            RuntimeError: a step that is not in a window whose factors are known: batches were read too far ahead.
        """
        place = step // self.every - self._window
        if not 0 <= place < len(self._factors):
            last = (self._window + len(self._factors)) * self.every
            raise RuntimeError(f"step: expected one of {self._window * self.every} to {last - 1}, got {step}")
        return self._factors[place]

    def _go_on(self, factors: dict[str, float]) -> None:
        """To the next window; the factors are those of the last one that is known then."""
        self._window, self._factors = self._window + 1, [*self._factors[1:], factors]

    def state_dict(self) -> dict[str, Any]:
        """All of it, as JSON values."""
        return {name: _copied(getattr(self, f"_{name}")) for name in self.kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        for name, value in state.items():
            setattr(self, f"_{name}", _copied(value))


def _copied(value: Any) -> Any:
    """Containers anew: what is being written to a checkpoint must not change."""
    if isinstance(value, dict):
        return {name: _copied(each) for name, each in value.items()}
    return [_copied(each) for each in value] if isinstance(value, list) else value
