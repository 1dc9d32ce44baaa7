from mmkernels.pretrain.encoders import Patches
from mmkernels.pretrain.metrics import LinearProbe, NearestNeighbours
from mmkernels.pretrain.objectives import Contrast
from mmkernels.pretrain.recipe import Recipe, Stream
from mmkernels.pretrain.state import Ema
from mmkernels.pretrain.views import RandomCrop

RECIPE = Recipe(
    "Recognise an image in another crop, among the keys of a slowly moving twin in a queue",
    source="He et al. 2020, arXiv:1911.05722; in both directions: Chen et al. 2021, arXiv:2104.02057",
    data="emoji",
    streams={
        "query": Stream(Patches(), field="image", views=(RandomCrop(salt=1),), project="mlp", teacher=Ema(0.99)),
        "key": Stream(Patches(), field="image", views=(RandomCrop(salt=2),), project="mlp", tied="query"),
    },
    # A queue much smaller than the data: a larger one holds the image itself, in other crops, among its negatives.
    objectives={"views": Contrast("query", "key", queue=512, positives="sample")},
    metrics=(NearestNeighbours("query"), LinearProbe("query")),
    settings={"batch": 64, "steps": 1000},
)
