"""How streams meet."""

from mmkernels.pretrain.fusion.cross import Cross

__all__ = ["Cross"]
