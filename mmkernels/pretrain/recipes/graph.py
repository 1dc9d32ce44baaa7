from mmkernels.pretrain.encoders import Graph, HashedWords
from mmkernels.pretrain.metrics import Retrieval
from mmkernels.pretrain.objectives import Contrast
from mmkernels.pretrain.recipe import Recipe, Stream
from mmkernels.pretrain.views import Captions

RECIPE = Recipe(
    "Contrast the graph of an image's regions, which attend to their neighbours, with captions",
    source="Brody et al. 2022, arXiv:2105.14491",
    data="scenes",
    streams={
        "regions": Stream(Graph(layers=2)),
        "text": Stream(HashedWords(), views=(Captions(),)),
    },
    objectives={"contrast": Contrast("regions", "text")},
    metrics=(Retrieval("regions", "text"),),
    settings={"eval_limit": 512},
)
