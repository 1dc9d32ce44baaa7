from mmkernels.pretrain.encoders import HashedWords, Patches
from mmkernels.pretrain.metrics import Retrieval, ZeroShot
from mmkernels.pretrain.objectives import Sigmoid
from mmkernels.pretrain.recipe import Recipe, Stream
from mmkernels.pretrain.views import Augment, Captions

RECIPE = Recipe(
    "Ask of every pair of the batch whether image and caption belong together",
    source="Zhai et al. 2023, arXiv:2303.15343",
    data="emoji",
    streams={
        "image": Stream(Patches(), views=(Augment(),)),
        "text": Stream(HashedWords(), views=(Captions(),)),
    },
    objectives={"sigmoid": Sigmoid("image", "text")},
    metrics=(Retrieval("image", "text"), ZeroShot("image", "text")),
    settings={"batch": 256, "steps": 600},
)
