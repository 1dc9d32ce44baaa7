from mmkernels.pretrain.encoders import Words
from mmkernels.pretrain.fusion import Cross
from mmkernels.pretrain.metrics import Predictions
from mmkernels.pretrain.objectives import MaskedTokens, Matching
from mmkernels.pretrain.recipe import Recipe, Stream
from mmkernels.pretrain.views import MaskWords

RECIPE = Recipe(
    "Predict masked words, the same of a text at every step, and whether a passage follows another",
    source="Devlin et al. 2019, arXiv:1810.04805",
    data="text",
    streams={
        "text": Stream(Words(layers=2, max_tokens=160), views=(MaskWords(static=True),), project="none"),
        "next": Stream(tied="text", encoder=Words(max_tokens=160), views=(MaskWords(static=True),)),
    },
    fusion=Cross(into=("text",), context="next", layers=2),
    objectives={
        "words": MaskedTokens("text"),
        "follows": Matching("text", "next", read="text", scale=0.0),
    },
    metrics=(Predictions("words"), Predictions("follows")),
    settings={"tokens": 4096, "batch": 32, "chunk": 32, "steps": 1000},
)
