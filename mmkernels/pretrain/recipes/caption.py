from mmkernels.pretrain.encoders import Patches, Words
from mmkernels.pretrain.fusion import Merged
from mmkernels.pretrain.metrics import Captioning, Predictions
from mmkernels.pretrain.objectives import NextToken
from mmkernels.pretrain.recipe import Recipe, Stream
from mmkernels.pretrain.views import Captions

RECIPE = Recipe(
    "Caption an image: its patches are a prefix that every token sees, the caption follows token by token",
    source="Wang et al. 2022, arXiv:2108.10904",
    data="scenes",
    streams={
        "image": Stream(Patches()),
        "text": Stream(Words(layers=0, causal=True), views=(Captions(),)),
    },
    fusion=Merged(("image", "text"), layers=4, mask="prefix"),
    objectives={"words": NextToken("text")},
    metrics=(Predictions("words"), Captioning("words", most_tokens=20)),
    settings={"batch": 64, "chunk": 64, "steps": 1000, "eval_every": 500, "eval_limit": 512},
)
