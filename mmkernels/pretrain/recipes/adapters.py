from mmkernels.pretrain.encoders import Adapted, HashedWords, Patches
from mmkernels.pretrain.metrics import Retrieval
from mmkernels.pretrain.objectives import Contrast
from mmkernels.pretrain.recipe import Recipe, Stage, Stream
from mmkernels.pretrain.views import Augment, Captions

RECIPE = Recipe(
    "Adapters in a frozen CLIP: --init RUN --stages.stage-0.until 0; without, the first 100 steps train what is frozen",
    source="Houlsby et al. 2019, arXiv:1902.00751",
    data="scenes",
    streams={
        "image": Stream(Adapted(Patches(), reduction=8), views=(Augment(),)),
        "text": Stream(Adapted(HashedWords(), reduction=8), views=(Captions(),)),
    },
    objectives={"contrast": Contrast("image", "text")},
    metrics=(Retrieval("image", "text"),),
    stages=(
        Stage(until=100, trainable=("*", "!*.adapter.*")),
        Stage(trainable=("*.adapter.*", "*.norm.*", "*.project.*", "objectives.*")),
    ),
    settings={"eval_limit": 512},
)
