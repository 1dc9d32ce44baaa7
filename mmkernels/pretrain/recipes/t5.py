from mmkernels.pretrain.encoders import Words
from mmkernels.pretrain.fusion import Cross
from mmkernels.pretrain.metrics import Perplexity, Predictions
from mmkernels.pretrain.objectives import NextToken
from mmkernels.pretrain.recipe import Recipe, Stream
from mmkernels.pretrain.views import CorruptSpans

RECIPE = Recipe(
    "Write the spans that are missing from a text: an encoder, and a decoder that reads it",
    source="Raffel et al. 2020, arXiv:1910.10683",
    data="text",
    streams={
        "text": Stream(Words(layers=3, max_tokens=160), views=(CorruptSpans(part="input"),)),
        "target": Stream(
            Words(layers=0, causal=True, max_tokens=160),
            field="text",
            views=(CorruptSpans(part="target"),),
        ),
    },
    fusion=Cross(into=("target",), context="text", layers=2),
    objectives={"spans": NextToken("target")},
    metrics=(Perplexity("spans"), Predictions("spans")),
    settings={"tokens": 2560, "batch": 32, "chunk": 32, "steps": 1000},
)
