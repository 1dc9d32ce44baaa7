"""Packing: variable-length multimodal samples into dense token batches, and rows of tokens moved with gradients."""

from mmkernels.ops.packing.api import embed_splice, pack, pad, segment_pool, unpack, unpad
from mmkernels.ops.packing.balance import RankSchedule, balance_ranks
from mmkernels.ops.packing.batch import PackedBatch
from mmkernels.ops.packing.cost import AttentionCost, EncoderCost
from mmkernels.ops.packing.media import Media, PackedMedia
from mmkernels.ops.packing.plan import PackingPlan, plan_packing
from mmkernels.ops.packing.stream import StreamPlanner
from mmkernels.ops.packing.vision import mrope_position_ids, patchify, unpatchify

__all__ = [
    "AttentionCost",
    "EncoderCost",
    "Media",
    "PackedBatch",
    "PackedMedia",
    "PackingPlan",
    "RankSchedule",
    "StreamPlanner",
    "balance_ranks",
    "embed_splice",
    "mrope_position_ids",
    "pack",
    "pad",
    "patchify",
    "plan_packing",
    "segment_pool",
    "unpack",
    "unpad",
    "unpatchify",
]
