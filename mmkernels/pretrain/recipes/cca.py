from mmkernels.pretrain.encoders import HashedWords, Patches
from mmkernels.pretrain.metrics import Retrieval
from mmkernels.pretrain.objectives import Correlation
from mmkernels.pretrain.recipe import Recipe, Shape, Stream
from mmkernels.pretrain.views import Augment, Captions

RECIPE = Recipe(
    "Correlate images and names as far as linear maps can: deep canonical correlation analysis",
    source="Andrew et al. 2013, Deep Canonical Correlation Analysis",
    data="emoji",
    streams={
        "image": Stream(Patches(), views=(Augment(),)),
        "text": Stream(HashedWords(), views=(Captions(),)),
    },
    objectives={"correlation": Correlation("image", "text", ridge=1e-3)},
    metrics=(Retrieval("image", "text", through="correlation"),),
    model=Shape(embed_dim=32),
    settings={"batch": 256},
)
