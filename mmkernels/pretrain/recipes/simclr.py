from mmkernels.pretrain.encoders import Patches
from mmkernels.pretrain.metrics import LinearProbe, NearestNeighbours
from mmkernels.pretrain.objectives import NtXent
from mmkernels.pretrain.recipe import Recipe, Stream
from mmkernels.pretrain.views import RandomCrop

RECIPE = Recipe(
    "Recognise an image in another crop and other colours, among all crops of the batch",
    source="Chen et al. 2020, arXiv:2002.05709",
    data="emoji",
    streams={
        "a": Stream(Patches(), field="image", views=(RandomCrop(salt=1),), project="mlp"),
        "b": Stream(Patches(), field="image", views=(RandomCrop(salt=2),), project="mlp", tied="a"),
    },
    objectives={"views": NtXent("a", "b")},
    metrics=(NearestNeighbours("a"), LinearProbe("a")),
    settings={"steps": 600, "chunk": 128},
)
