from mmkernels.pretrain.encoders import Regions, Words
from mmkernels.pretrain.fusion import Merged
from mmkernels.pretrain.metrics import Matched, Predictions
from mmkernels.pretrain.objectives import MaskedRegions, MaskedTokens, Matching
from mmkernels.pretrain.recipe import Recipe, Stream
from mmkernels.pretrain.views import Captions, MaskRegions, MaskWords, Swap

RECIPE = Recipe(
    "One stream of words and regions, all tasks at once: masked words, classes of masked regions, matching",
    source="Li et al. 2020, arXiv:1908.06066",
    data="scenes",
    streams={
        "text": Stream(Words(layers=0), views=(Captions(), Swap(), MaskWords())),
        "regions": Stream(Regions(), views=(MaskRegions(share=0.5, keep=0.5),)),
    },
    fusion=Merged(("text", "regions"), layers=4),
    objectives={
        "words": MaskedTokens("text"),
        "regions": MaskedRegions("regions"),
        "matching": Matching("regions", "text", read="merged", negatives="swapped"),
    },
    metrics=(
        Matched("matching", "regions", "text"),
        Predictions("words"),
        Predictions("regions"),
        Predictions("matching"),
    ),
    settings={"batch": 64, "chunk": 64, "steps": 1500, "eval_every": 500, "eval_limit": 512},
)
