"""Begin a run with the weights of another."""

from __future__ import annotations

from collections.abc import Mapping
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
    fresh: list[str]  # of this model, which the other run lacks: they stay as they were drawn
    unused: list[str]  # of the other run, which this model lacks

    def __str__(self) -> str:
        parts = [f"init: {len(self.loaded)} tensors from {self.run} at step {self.step}"]
        for what, names in (("drawn anew", self.fresh), ("left out", self.unused)):
            parts += [f"{len(names)} {what} ({_some(names)})"] if names else []
        return "; ".join(parts)


@torch.no_grad()
def warm_start(model: nn.Module, run: Path) -> WarmStart:
    """Load those of another run's weights that the model has by name.

    Raises:
        RunFolderError: no run there, or no checkpoint yet.
        ValueError: no name fits, or a tensor of the same name has another shape.
    """
    step, given = stored_weights(run)
    own: Mapping[str, Tensor] = model.state_dict()
    loaded = [name for name in own if name in given]
    if not loaded:
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
    fresh, unused = [name for name in own if name not in given], [name for name in given if name not in own]
    return WarmStart(run, step, loaded, fresh, unused)


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
