"""The reference loop: every pretraining system of the field as a recipe, through the package's own public ops.

mmkernels recipes                           # what there is
mmkernels pretrain --recipe clip            # the embedded emoji, three to five minutes on two cores
mmkernels pretrain --data folder:photos     # your own images and captions
"""

from mmkernels.pretrain.cli import list_recipes, main
from mmkernels.pretrain.config import Config
from mmkernels.pretrain.finetune import finetuned
from mmkernels.pretrain.load import Pretrained, load_model
from mmkernels.pretrain.loop import Outcome, train
from mmkernels.pretrain.mixing import Mixing
from mmkernels.pretrain.policies import Policy
from mmkernels.pretrain.recipe import Facts, Ramp, Recipe, Shape, Stage, Stream
from mmkernels.pretrain.transfer import Transfer

__all__ = [
    "Config",
    "Facts",
    "Mixing",
    "Outcome",
    "Policy",
    "Pretrained",
    "Ramp",
    "Recipe",
    "Shape",
    "Stage",
    "Stream",
    "Transfer",
    "finetuned",
    "list_recipes",
    "load_model",
    "main",
    "train",
]
