from mmkernels.pretrain.encoders import Patches, Words
from mmkernels.pretrain.fusion import Cross
from mmkernels.pretrain.metrics import Predictions, Reranked, Retrieval
from mmkernels.pretrain.objectives import Contrast, MaskedTokens, Matching
from mmkernels.pretrain.recipe import Ramp, Recipe, Stream
from mmkernels.pretrain.state import Ema
from mmkernels.pretrain.views import Augment, Captions, MaskWords

RECIPE = Recipe(
    "Align before fuse: contrast, hard matching and masked words, with a momentum teacher",
    source="Li et al. 2021, arXiv:2107.07651",
    data="scenes",
    streams={
        "image": Stream(Patches(size=48), views=(Augment(),), teacher=Ema(0.995)),
        "text": Stream(Words(), views=(Captions(),), teacher=Ema(0.995)),
        "masked": Stream(Words(), field="text", views=(Captions(), MaskWords(share=0.4)), tied="text"),
    },
    fusion=Cross(into=("text", "masked"), context="image", layers=2),
    objectives={
        "contrast": Contrast("image", "text", queue=1024, distil=Ramp(0.0, 0.4, steps=1200)),
        "matching": Matching("image", "text"),
        "words": MaskedTokens("masked"),
    },
    metrics=(Retrieval("image", "text"), Reranked("matching"), Predictions("matching"), Predictions("words")),
    settings={"batch": 64, "chunk": 64, "steps": 1200, "eval_limit": 256},
)
