from mmkernels.pretrain.encoders import Regions, Words
from mmkernels.pretrain.fusion import Co
from mmkernels.pretrain.metrics import Grounding, Matched, Predictions
from mmkernels.pretrain.objectives import MaskedRegions, MaskedTokens, Matching
from mmkernels.pretrain.recipe import Recipe, Stream
from mmkernels.pretrain.views import Captions, MaskRegions, MaskWords, Swap

RECIPE = Recipe(
    "Two streams that attend to each other: masked words, scores of masked regions, matching with swapped captions",
    source="Lu et al. 2019, arXiv:1908.02265",
    data="scenes",
    streams={
        "text": Stream(Words(), views=(Captions(), Swap(), MaskWords())),
        "regions": Stream(Regions(), views=(MaskRegions(share=0.5, keep=0.5),)),
    },
    fusion=Co("text", "regions", layers=2),
    objectives={
        "words": MaskedTokens("text"),
        "regions": MaskedRegions("regions", target="distribution"),
        "matching": Matching("regions", "text", negatives="swapped"),
    },
    metrics=(
        Matched("matching", "regions", "text"),
        Grounding("matching"),
        Predictions("words"),
        Predictions("regions"),
        Predictions("matching"),
    ),
    settings={"batch": 64, "chunk": 64, "steps": 3000, "eval_every": 1000, "eval_limit": 512},
)
