"""Contrastive losses that never store the logit matrix."""

from .api import infonce, siglip

__all__ = ["infonce", "siglip"]
