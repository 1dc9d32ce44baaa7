"""Losses over the embeddings of a batch, and over tokens."""

from mmkernels.pretrain.objectives.answer import Answer
from mmkernels.pretrain.objectives.contrast import Contrast
from mmkernels.pretrain.objectives.correlation import Correlation
from mmkernels.pretrain.objectives.cycle import Cycle
from mmkernels.pretrain.objectives.hinge_rank import HingeRank
from mmkernels.pretrain.objectives.masked_patches import MaskedPatches
from mmkernels.pretrain.objectives.masked_regions import MaskedRegions
from mmkernels.pretrain.objectives.masked_tokens import MaskedTokens
from mmkernels.pretrain.objectives.matching import Matching
from mmkernels.pretrain.objectives.next_token import NextToken
from mmkernels.pretrain.objectives.nt_xent import NtXent
from mmkernels.pretrain.objectives.reconstruct import Reconstruct
from mmkernels.pretrain.objectives.sigmoid import Sigmoid

__all__ = [
    "Answer",
    "Contrast",
    "Correlation",
    "Cycle",
    "HingeRank",
    "MaskedPatches",
    "MaskedRegions",
    "MaskedTokens",
    "Matching",
    "NextToken",
    "NtXent",
    "Reconstruct",
    "Sigmoid",
]
