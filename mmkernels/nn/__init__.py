"""nn.Modules over the functions, with their parameters."""

from mmkernels.nn.attention import CoAttention, CrossModalAttention, FusedSelfAttention, GatedCrossAttention
from mmkernels.nn.attention_base import Rotary
from mmkernels.nn.contrastive import InfoNCELoss, SigLIPLoss

__all__ = [
    "CoAttention",
    "CrossModalAttention",
    "FusedSelfAttention",
    "GatedCrossAttention",
    "InfoNCELoss",
    "Rotary",
    "SigLIPLoss",
]
