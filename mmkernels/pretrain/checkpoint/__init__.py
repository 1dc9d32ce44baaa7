"""Checkpoints: any number of ranks writes one, any other number reads it; a kill at any moment leaves a complete one.

checkpoints/step-00000450/weights__0_0.distcp     of rank 0, what it holds of weights and buffers
                          optimizer__0_0.distcp   and of the optimizer's state
                          .metadata               the index of `torch.distributed.checkpoint`, for its own tools
                          index.json              the same, which is read here: a pickle may run code
                          training.pt             data cursor and other small values
                          manifest.json           size and checksum of each of these; written last

`torch.distributed.checkpoint` plans and writes the shards, so that its tools read them. Nothing here unpickles
`.metadata` or a shard: `index.json` tells where the bytes of a tensor lie. `training.pt`, which only resuming needs, is
read with `weights_only=True`.
"""

from mmkernels.pretrain.checkpoint.folders import (
    DamagedError,
    SaveError,
    latest,
    newest_whole,
    step_of,
    steps_in,
    whole,
)
from mmkernels.pretrain.checkpoint.naming import weights_of
from mmkernels.pretrain.checkpoint.reading import fill, load, load_into, load_weights
from mmkernels.pretrain.checkpoint.saver import Saver, save

__all__ = [
    "DamagedError",
    "SaveError",
    "Saver",
    "fill",
    "latest",
    "load",
    "load_into",
    "load_weights",
    "newest_whole",
    "save",
    "step_of",
    "steps_in",
    "weights_of",
    "whole",
]
