from mmkernels.pretrain.encoders import Patches, Words
from mmkernels.pretrain.fusion import Cross
from mmkernels.pretrain.metrics import Predictions, Reranked, Retrieval
from mmkernels.pretrain.objectives import Contrast, MaskedTokens, Matching
from mmkernels.pretrain.recipe import Recipe, Stage, Stream
from mmkernels.pretrain.views import Augment, Captions, MaskWords

RECIPE = Recipe(
    "Streams first, then the first layer of their fusion, then all of it, at a lower learning rate",
    source="staged unfreezing: Howard and Ruder 2018, arXiv:1801.06146",
    data="emoji",
    streams={
        "image": Stream(Patches(), views=(Augment(),)),
        "text": Stream(Words(), views=(Captions(),)),
        "masked": Stream(Words(), field="text", views=(Captions(), MaskWords(when=("words",))), tied="text"),
    },
    fusion=Cross(into=("text", "masked"), context="image", layers=2),
    objectives={
        "contrast": Contrast("image", "text"),
        "matching": Matching("image", "text"),
        "words": MaskedTokens("masked"),
    },
    metrics=(Retrieval("image", "text"), Reranked("matching"), Predictions("matching"), Predictions("words")),
    stages=(
        Stage(until=200, trainable=("streams.*", "objectives.contrast.*"), objectives=("contrast",), fusion_depth=0),
        Stage(until=400, trainable=("fusion.layers.0.*", "objectives.*"), fusion_depth=1),
        Stage(lr_scale=0.5),
    ),
    settings={"chunk": 128},
)
