from mmkernels.pretrain.encoders import Words
from mmkernels.pretrain.metrics import Perplexity, Predictions
from mmkernels.pretrain.objectives import MaskedTokens
from mmkernels.pretrain.recipe import Recipe, Stream
from mmkernels.pretrain.views import MaskWords

RECIPE = Recipe(
    "Predict masked words, others at every step",
    source="Liu et al. 2019, arXiv:1907.11692; 40% masked: Wettig et al. 2023, arXiv:2202.08005",
    data="text",
    streams={"text": Stream(Words(layers=4, max_tokens=160), views=(MaskWords(share=0.4),))},
    objectives={"words": MaskedTokens("text")},
    metrics=(Perplexity("words"), Predictions("words")),
    settings={"tokens": 2048, "batch": 32, "chunk": 32, "steps": 1500},
)
