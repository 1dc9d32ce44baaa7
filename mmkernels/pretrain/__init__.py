"""The reference loop: a dual encoder on images and captions, through the package's own public ops.

mmkernels pretrain --recipe clip            # the embedded emoji, about three minutes on two cores
mmkernels pretrain --data folder:photos     # your own images and captions
"""

from mmkernels.pretrain.cli import main
from mmkernels.pretrain.config import Config, ModelConfig
from mmkernels.pretrain.load import load_model
from mmkernels.pretrain.loop import Outcome, train

__all__ = ["Config", "ModelConfig", "Outcome", "load_model", "main", "train"]
