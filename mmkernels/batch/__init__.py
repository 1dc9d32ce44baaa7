"""A packed batch: samples of text and media in one row of tokens."""

from mmkernels.batch.media import Media, PackedMedia
from mmkernels.batch.packed_batch import PackedBatch

__all__ = ["Media", "PackedBatch", "PackedMedia"]
