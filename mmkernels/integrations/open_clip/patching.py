"""open_clip with its losses replaced, for trainers that construct them by name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from mmkernels.integrations.open_clip import losses

__all__ = ["patched"]

_NAMES = ("ClipLoss", "CoCaLoss", "DistillClipLoss", "SigLipLoss")
_MODULES = ("open_clip", "open_clip.loss", "open_clip.factory")


@contextmanager
def patched() -> Iterator[None]:
    """Within it, `open_clip.create_loss` and the tasks of open_clip construct the losses of mmkernels.

    Replaced are the names `ClipLoss`, `CoCaLoss`, `DistillClipLoss` and `SigLipLoss` in `open_clip` and its modules;
    losses that were constructed before stay what they are. It holds for the whole process, so threads should not nest
    or overlap it.

    Raises:
        RuntimeError: at the end, if someone else has replaced them meanwhile.

    Example:
        >>> with patched():
        ...     loss = open_clip.create_loss(args)
    """
    places = [
        (module, name) for module in map(importlib.import_module, _MODULES) for name in _NAMES if hasattr(module, name)
    ]
    before = [getattr(module, name) for module, name in places]
    for module, name in places:
        setattr(module, name, getattr(losses, name))
    try:
        yield
    finally:
        for (module, name), own in zip(places, before, strict=True):
            if getattr(module, name) is getattr(losses, name):
                setattr(module, name, own)
            elif sys.exc_info()[0] is None:
                raise RuntimeError(f"{module.__name__}.{name}: expected {getattr(losses, name)}, got another class")
