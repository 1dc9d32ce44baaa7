"""Begin a run with the weights of another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmkernels.pretrain.load import stored_weights

__all__ = ["WarmStart", "warm_start"]

_SHOWN = 5  # names in a message


class WarmStart(NamedTuple):
    """What became of the weights of another run, by name."""

    run: Path
    step: int  # of the other run
    loaded: list[str]
    fresh: list[str]  # of this model, which the other run lacks, or which were asked for: they stay as they were drawn
    unused: list[str]  # of the other run, the rest

    def __str__(self) -> str:
        parts = [f"init: {len(self.loaded)} tensors from {self.run} at step {self.step}"]
        for what, names in (("drawn anew", self.fresh), ("left out", self.unused)):
            parts += [f"{len(names)} {what} ({_some(names)})"] if names else []
        return "; ".join(parts)


@torch.no_grad()
def warm_start(model: nn.Module, run: Path, fresh: Sequence[str] = ()) -> WarmStart:
    """Load those of another run's weights that the model has by name.

    Args:
        model: on any device.
        run: folder of the other run, or of exported weights.
        fresh: patterns of names that are not loaded.

    Raises:
        RunFolderError: no run there, or no checkpoint yet.
        ValueError: no name fits, or a tensor of the same name has another shape; a pattern of `fresh` fits none.
    """
    step, given = stored_weights(run)
    own: Mapping[str, Tensor] = model.state_dict()
    for pattern in fresh:
        if not any(fnmatchcase(name, pattern) for name in own):
            raise ValueError(f"fresh: expected patterns of parameter names, got {pattern!r}, which fits none")
    anew = {name for name in own if any(fnmatchcase(name, pattern) for pattern in fresh)}
    loaded = [name for name in own if name in given and name not in anew]
    if not loaded and len(anew) < len(own):
        raise ValueError(
            f"init: expected a run whose parameters are called as this model's, such as {_some(list(own))}, "
            f"got {run}, whose are called {_some(list(given))}"
        )
    other = [name for name in loaded if own[name].shape != given[name].shape]
    if other:
        shapes = "; ".join(f"{n}: {list(given[n].shape)} for {list(own[n].shape)}" for n in other[:_SHOWN])
        raise ValueError(f"init: expected tensors of this model's shapes, got of {run} {shapes} ({len(other)} in all)")
    for name in loaded:
        own[name].copy_(given[name])
    kept = set(loaded)
    return WarmStart(run, step, loaded, [n for n in own if n not in kept], [n for n in given if n not in kept])


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
