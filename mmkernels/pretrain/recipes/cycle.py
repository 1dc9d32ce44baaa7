from mmkernels.pretrain.encoders import Patches, Words
from mmkernels.pretrain.metrics import Retrieval
from mmkernels.pretrain.objectives import Cycle, Reconstruct
from mmkernels.pretrain.recipe import Recipe, Stream
from mmkernels.pretrain.views import Augment, Captions

RECIPE = Recipe(
    "Two autoencoders, and maps between their embeddings that lead there and back again",
    source="Zhu et al. 2017, arXiv:1703.10593",
    data="emoji",
    streams={
        "image": Stream(Patches(), views=(Augment(),)),
        "text": Stream(Words(), views=(Captions(),)),
    },
    objectives={
        "pixels": Reconstruct("image"),
        "words": Reconstruct("text"),
        "cycle": Cycle("image", "text", paired=0.5),
    },
    metrics=(Retrieval("image", "text", through="cycle"),),
)
