from mmkernels.pretrain.encoders import Regions, Words
from mmkernels.pretrain.fusion import Merged
from mmkernels.pretrain.metrics import Matched, Predictions
from mmkernels.pretrain.objectives import MaskedTokens, Matching
from mmkernels.pretrain.recipe import Recipe, Stream
from mmkernels.pretrain.views import Captions, MaskWords, Swap

RECIPE = Recipe(
    "Words, object tags and regions in one stream: masked words and tags, and whether the tags are the image's",
    source="Li et al. 2020, arXiv:2004.06165",
    data="scenes",
    streams={
        "text": Stream(Words(layers=0), views=(Captions(), MaskWords())),
        "tags": Stream(Words(layers=0), views=(Swap(), MaskWords()), tied="text"),
        "regions": Stream(Regions()),
    },
    fusion=Merged(("text", "tags", "regions"), layers=4),
    objectives={
        "words": MaskedTokens("text"),
        "tags": MaskedTokens("tags"),
        "matching": Matching("regions", "tags", read="merged", negatives="swapped"),
    },
    metrics=(
        Matched("matching", "regions", "tags"),
        Predictions("words"),
        Predictions("tags"),
        Predictions("matching"),
    ),
    settings={"batch": 64, "chunk": 64, "steps": 3000, "eval_every": 1000, "eval_limit": 512},
)
