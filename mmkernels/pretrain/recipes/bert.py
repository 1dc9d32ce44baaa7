from mmkernels.pretrain.encoders import Words
from mmkernels.pretrain.fusion import Merged
from mmkernels.pretrain.metrics import Perplexity, Predictions
from mmkernels.pretrain.objectives import MaskedTokens, Matching
from mmkernels.pretrain.recipe import Recipe, Stream
from mmkernels.pretrain.views import MaskWords, Swap

RECIPE = Recipe(
    "Predict masked words of two passages, the same ones at every step, and whether the second follows the first",
    source="Devlin et al. 2019, arXiv:1810.04805",
    data="text",
    streams={
        "text": Stream(Words(layers=0, max_tokens=160), views=(MaskWords(share=0.4, static=True),)),
        "next": Stream(Words(layers=0, max_tokens=160), views=(Swap(), MaskWords(share=0.4, static=True)), tied="text"),
    },
    fusion=Merged(("text", "next"), layers=4),
    objectives={
        "words": MaskedTokens("text", unmatched=True),
        "next_words": MaskedTokens("next", unmatched=True),
        "follows": Matching("text", "next", read="merged", negatives="swapped"),
    },
    metrics=(Perplexity("words"), Predictions("words"), Predictions("follows")),
    settings={"tokens": 3072, "batch": 32, "chunk": 32, "steps": 2000},
)
