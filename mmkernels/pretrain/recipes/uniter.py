from mmkernels.pretrain.encoders import Regions, Words
from mmkernels.pretrain.fusion import Merged
from mmkernels.pretrain.metrics import Matched, Predictions
from mmkernels.pretrain.objectives import MaskedRegions, MaskedTokens, Matching
from mmkernels.pretrain.recipe import Recipe, Stream
from mmkernels.pretrain.views import Captions, MaskRegions, MaskWords, Swap

RECIPE = Recipe(
    "One stream of words and regions; each step draws a task, and only one modality is masked",
    source="Chen et al. 2020, arXiv:1909.11740",
    data="scenes",
    streams={
        "text": Stream(
            Words(layers=0),
            views=(Captions(), Swap(when=("matching",)), MaskWords(share=0.4, when=("words",))),
        ),
        "regions": Stream(
            Regions(),
            views=(
                MaskRegions(share=0.5, keep=0.0, when=("features",)),
                MaskRegions(share=0.5, keep=0.5, when=("classes",)),
            ),
        ),
    },
    fusion=Merged(("text", "regions"), layers=4),
    objectives={
        "words": MaskedTokens("text", weight=2.0),
        "matching": Matching("regions", "text", read="merged", negatives="swapped", weight=2.0),
        "features": MaskedRegions("regions", target="features"),
        "classes": MaskedRegions("regions", target="class"),
    },
    metrics=(
        Matched("matching", "regions", "text"),
        Predictions("words"),
        Predictions("matching"),
        Predictions("features"),
        Predictions("classes"),
    ),
    draw=True,
    settings={"batch": 64, "chunk": 64, "steps": 4000, "eval_every": 2000, "eval_limit": 512},
)
