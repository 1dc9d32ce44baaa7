"""A window of steps under the PyTorch profiler."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["ProfileWindow"]


class ProfileWindow:
    """Trace steps first .. first + count - 1 into `profile.json`, for chrome://tracing or ui.perfetto.dev.

    Args:
        window: (first, count) counted from 0, or None for no profile.
        folder: where the trace goes.
    """

    def __init__(self, window: tuple[int, int] | None, folder: Path) -> None:
        self.first, self.count = window or (-1, 0)
        self.path = folder / "profile.json"
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """Call before each step."""
        if self._profile is not None and step >= self.first + self.count:
            self.close()
        elif self._profile is None and self.count and step == self.first:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities, profile_memory=True)
            self._profile.start()

    def close(self) -> None:
        """Write the trace."""
        if self._profile is not None:
            self._profile.stop()
            with TemporaryDirectory() as folder:  # PyTorch cannot write to a path that is not UTF-8
                trace = f"{folder}/trace.json"
                self._profile.export_chrome_trace(trace)
                shutil.move(trace, self.path)
            self._profile = None
