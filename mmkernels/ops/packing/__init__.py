"""Packing: gather, scatter and pool token rows, and patchify images, with gradients."""

from mmkernels.ops.packing.api import embed_splice, pack, pad, segment_pool, unpack, unpad
from mmkernels.ops.packing.late_interaction import maxsim
from mmkernels.ops.packing.mrope import mrope_position_ids
from mmkernels.ops.packing.vision import patchify, unpatchify

__all__ = [
    "embed_splice",
    "maxsim",
    "mrope_position_ids",
    "pack",
    "pad",
    "patchify",
    "segment_pool",
    "unpack",
    "unpad",
    "unpatchify",
]
