from mmkernels.pretrain.encoders import Words
from mmkernels.pretrain.metrics import Perplexity, Predictions
from mmkernels.pretrain.objectives import NextToken
from mmkernels.pretrain.recipe import Recipe, Stream

RECIPE = Recipe(
    "Predict the next token of a text",
    source="Radford et al. 2019, Language Models are Unsupervised Multitask Learners",
    data="text",
    streams={"text": Stream(Words(layers=4, causal=True, max_tokens=160))},
    objectives={"words": NextToken("text")},
    metrics=(Perplexity("words"), Predictions("words")),
    settings={"tokens": 2048, "batch": 32, "chunk": 32, "steps": 1000},
)
