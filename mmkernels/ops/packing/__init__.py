"""Packing: variable-length multimodal samples into dense token batches, and rows of tokens moved with gradients."""

from .api import pack, pad, segment_pool, unpack, unpad
from .balance import RankSchedule, balance_ranks
from .batch import PackedBatch
from .cost import AttentionCost, EncoderCost
from .plan import PackingPlan, plan_packing
from .stream import StreamPlanner

__all__ = [
    "AttentionCost",
    "EncoderCost",
    "PackedBatch",
    "PackingPlan",
    "RankSchedule",
    "StreamPlanner",
    "balance_ranks",
    "pack",
    "pad",
    "plan_packing",
    "segment_pool",
    "unpack",
    "unpad",
]
