"""Random changes of a stream's values and tokens."""

from mmkernels.pretrain.views.augment import Augment
from mmkernels.pretrain.views.captions import Captions
from mmkernels.pretrain.views.corrupt_spans import CorruptSpans
from mmkernels.pretrain.views.mask_regions import MaskRegions
from mmkernels.pretrain.views.mask_words import MaskWords
from mmkernels.pretrain.views.swap import Swap

__all__ = ["Augment", "Captions", "CorruptSpans", "MaskRegions", "MaskWords", "Swap"]
