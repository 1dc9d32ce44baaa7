"""open_clip with the losses of mmkernels, and trained models of mmkernels in open_clip.

    from mmkernels.integrations.open_clip import ClipLoss           # for open_clip.ClipLoss, in a loop of your own
    torchrun -m mmkernels.integrations.open_clip --train-data ...   # for `torchrun -m open_clip_train.main`

The losses need open_clip alone; `to_open_clip` also what `mmkernels[pretrain]` installs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmkernels.integrations.open_clip.losses import ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss
from mmkernels.integrations.open_clip.patching import patched

if TYPE_CHECKING:
    from mmkernels.integrations.open_clip.model import OpenClip, Preprocess, Tokenize, to_open_clip

_OF_MODELS = ("OpenClip", "Preprocess", "Tokenize", "to_open_clip")

__all__ = [
    "ClipLoss",
    "CoCaLoss",
    "DistillClipLoss",
    "OpenClip",
    "Preprocess",
    "SigLipLoss",
    "Tokenize",
    "patched",
    "to_open_clip",
]


def __getattr__(name: str) -> Any:
    if name not in _OF_MODELS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mmkernels.integrations.open_clip import model

    return getattr(model, name)
