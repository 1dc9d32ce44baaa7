from mmkernels.pretrain.encoders import Regions, Words
from mmkernels.pretrain.fusion import Merged
from mmkernels.pretrain.metrics import Predictions
from mmkernels.pretrain.objectives import MaskedRegions, MaskedTokens
from mmkernels.pretrain.recipe import Recipe, Stream
from mmkernels.pretrain.views import Captions, MaskRegions, MaskWords

RECIPE = Recipe(
    "One stream, in which every word carries the mean of the regions: masked words and masked regions",
    source="Su et al. 2020, arXiv:1908.08530",
    data="scenes",
    streams={
        "text": Stream(Words(layers=0), views=(Captions(), MaskWords())),
        "regions": Stream(Regions(), views=(MaskRegions(share=0.5, keep=0.5),)),
    },
    fusion=Merged(("text", "regions"), layers=4, everywhere="regions"),
    objectives={"words": MaskedTokens("text"), "regions": MaskedRegions("regions")},
    metrics=(Predictions("words"), Predictions("regions")),
    settings={"batch": 64, "chunk": 64, "steps": 1500, "eval_every": 500, "eval_limit": 512},
)
