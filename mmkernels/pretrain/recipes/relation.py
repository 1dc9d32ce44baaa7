from mmkernels.pretrain.encoders import Regions, Words
from mmkernels.pretrain.fusion import Merged
from mmkernels.pretrain.metrics import Predictions
from mmkernels.pretrain.objectives import Answer
from mmkernels.pretrain.recipe import Recipe, Stream
from mmkernels.pretrain.views import Captions

RECIPE = Recipe(
    "What the first of two regions is to the second, from both and the caption",
    source="Lu et al. 2016, Visual Relationship Detection with Language Priors, arXiv:1608.00187",
    data="scenes",
    streams={
        "text": Stream(Words(layers=0), views=(Captions(),)),
        "pair": Stream(Regions()),
    },
    fusion=Merged(("text", "pair"), layers=2),
    objectives={"relation": Answer("pair", label="relation", pool="first")},  # of the first, which sees the second
    metrics=(Predictions("relation"),),
    settings={"batch": 64, "chunk": 64, "steps": 300, "eval_every": 100, "eval_limit": 512},
)
