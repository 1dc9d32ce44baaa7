"""Random changes of a stream's values and tokens."""

from mmkernels.pretrain.views.augment import Augment
from mmkernels.pretrain.views.captions import Captions
from mmkernels.pretrain.views.corrupt_spans import CorruptSpans
from mmkernels.pretrain.views.mask_patches import MaskPatches
from mmkernels.pretrain.views.mask_regions import MaskRegions
from mmkernels.pretrain.views.mask_words import MaskWords
from mmkernels.pretrain.views.random_crop import RandomCrop
from mmkernels.pretrain.views.swap import Swap
from mmkernels.pretrain.views.warp_sound import WarpSound

__all__ = [
    "Augment",
    "Captions",
    "CorruptSpans",
    "MaskPatches",
    "MaskRegions",
    "MaskWords",
    "RandomCrop",
    "Swap",
    "WarpSound",
]
