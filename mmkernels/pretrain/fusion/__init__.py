"""How streams meet."""

from mmkernels.pretrain.fusion.co import Co
from mmkernels.pretrain.fusion.cross import Cross
from mmkernels.pretrain.fusion.merged import Merged

__all__ = ["Co", "Cross", "Merged"]
