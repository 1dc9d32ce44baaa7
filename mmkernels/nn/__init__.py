"""The functions as modules, with the parameters that belong to them."""

from .contrastive import InfoNCELoss, SigLIPLoss

__all__ = ["InfoNCELoss", "SigLIPLoss"]
