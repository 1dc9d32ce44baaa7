from mmkernels.pretrain.encoders import Patches, Words
from mmkernels.pretrain.fusion import Cross
from mmkernels.pretrain.metrics import Groups, Predictions
from mmkernels.pretrain.objectives import Answer, NextToken
from mmkernels.pretrain.recipe import Recipe, Stream
from mmkernels.pretrain.views import Captions

RECIPE = Recipe(
    "Answer questions about an image that the question's words attend to; captions teach the same layers to see",
    source="Antol et al. 2015, arXiv:1505.00468; captions beside it: Wang et al. 2022 (GIT), arXiv:2205.14100",
    data="scenes",
    streams={
        "image": Stream(Patches(size=48, patch=8)),
        "question": Stream(Words(layers=0), views=(Captions(),)),
        # An answer says little of what a picture shows. Without captions: --without text.
        "text": Stream(Words(layers=0, causal=True), views=(Captions(),)),
    },
    fusion=Cross(into=("question", "text"), context="image", layers=3),
    objectives={"answer": Answer("question", label="answer"), "words": NextToken("text")},
    metrics=(Predictions("answer"), Groups(Predictions("answer"), "kind")),
    settings={"batch": 64, "chunk": 64, "steps": 2000, "eval_every": 1000, "eval_limit": 512},
)
