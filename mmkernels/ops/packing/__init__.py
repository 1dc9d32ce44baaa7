"""Packing: variable-length multimodal samples into dense token batches, and rows of tokens moved with gradients."""

from .api import pack, pad, segment_pool, unpack, unpad
from .batch import PackedBatch
from .plan import PackingPlan, plan_packing

__all__ = ["PackedBatch", "PackingPlan", "pack", "pad", "plan_packing", "segment_pool", "unpack", "unpad"]
