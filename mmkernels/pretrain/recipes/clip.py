from mmkernels.pretrain.encoders import HashedWords, Patches
from mmkernels.pretrain.metrics import Retrieval, ZeroShot
from mmkernels.pretrain.objectives import Contrast
from mmkernels.pretrain.recipe import Recipe, Stream
from mmkernels.pretrain.views import Augment, Captions

RECIPE = Recipe(
    "Contrast images with their captions: symmetric InfoNCE over the batch",
    source="Radford et al. 2021, arXiv:2103.00020",
    data="emoji",
    streams={
        "image": Stream(Patches(), views=(Augment(),)),
        "text": Stream(HashedWords(vectors=True), views=(Captions(),)),
    },
    objectives={"contrast": Contrast("image", "text")},
    metrics=(Retrieval("image", "text"), ZeroShot("image", "text")),
    settings={"batch": 256, "steps": 600},
)
