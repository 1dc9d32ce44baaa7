"""The functions as modules, with the parameters that belong to them."""

from ._attention import Rotary
from .attention import CoAttention, CrossModalAttention, FusedSelfAttention, GatedCrossAttention
from .contrastive import InfoNCELoss, SigLIPLoss

__all__ = [
    "CoAttention",
    "CrossModalAttention",
    "FusedSelfAttention",
    "GatedCrossAttention",
    "InfoNCELoss",
    "Rotary",
    "SigLIPLoss",
]
