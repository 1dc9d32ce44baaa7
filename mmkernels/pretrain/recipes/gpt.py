from mmkernels.pretrain.encoders import Words
from mmkernels.pretrain.metrics import Predictions
from mmkernels.pretrain.objectives import NextToken
from mmkernels.pretrain.recipe import Recipe, Stream

RECIPE = Recipe(
    "Predict the next token of a text",
    source="Radford et al. 2019, Language Models are Unsupervised Multitask Learners",
    data="emoji",
    streams={"text": Stream(Words(layers=4, causal=True))},
    objectives={"words": NextToken("text")},
    metrics=(Predictions("words"),),
)
