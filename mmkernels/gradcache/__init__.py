"""Gradient caching: the gradient of a large batch with the activations of one chunk in memory."""

from mmkernels.gradcache.cache import GradCache
from mmkernels.gradcache.chunks import Args, Ragged

__all__ = ["Args", "GradCache", "Ragged"]
