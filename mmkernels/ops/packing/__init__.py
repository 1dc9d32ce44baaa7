"""Packing: variable-length multimodal samples into dense token batches, and rows of tokens moved with gradients."""

from .api import embed_splice, pack, pad, segment_pool, unpack, unpad
from .balance import RankSchedule, balance_ranks
from .batch import PackedBatch
from .cost import AttentionCost, EncoderCost
from .media import Media, PackedMedia
from .plan import PackingPlan, plan_packing
from .stream import StreamPlanner
from .vision import mrope_position_ids, patchify, unpatchify

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
