"""How streams meet."""

from mmkernels.pretrain.fusion.adapted import AdaptedFusion
from mmkernels.pretrain.fusion.co import Co
from mmkernels.pretrain.fusion.cross import Cross
from mmkernels.pretrain.fusion.gated import Gated
from mmkernels.pretrain.fusion.late import Late
from mmkernels.pretrain.fusion.merged import Merged
from mmkernels.pretrain.fusion.weighted import Weighted

__all__ = ["AdaptedFusion", "Co", "Cross", "Gated", "Late", "Merged", "Weighted"]
