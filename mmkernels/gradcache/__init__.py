"""Gradient caching: the gradient of a large batch with the activations of one chunk in memory."""

from .cache import GradCache
from .chunks import Args, Ragged

__all__ = ["Args", "GradCache", "Ragged"]
