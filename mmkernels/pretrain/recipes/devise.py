from mmkernels.pretrain.encoders import Patches, WordVectors
from mmkernels.pretrain.metrics import Retrieval
from mmkernels.pretrain.objectives import HingeRank
from mmkernels.pretrain.recipe import Recipe, Stream
from mmkernels.pretrain.views import Augment

RECIPE = Recipe(
    "Rank frozen word vectors by an image: hinge loss against every other name of the batch",
    source="Frome et al. 2013, DeViSE: A Deep Visual-Semantic Embedding Model",
    data="emoji",
    streams={
        "image": Stream(Patches(), views=(Augment(),)),
        "text": Stream(WordVectors(), project="none"),
    },
    objectives={"rank": HingeRank("image", "text", margin=0.1)},
    metrics=(Retrieval("image", "text"),),
    settings={"vocabulary": 8192},
)
