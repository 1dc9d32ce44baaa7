from mmkernels.pretrain.encoders import Patches, Words
from mmkernels.pretrain.fusion import Cross
from mmkernels.pretrain.metrics import Groups, Predictions
from mmkernels.pretrain.objectives import Answer
from mmkernels.pretrain.recipe import Recipe, Stream
from mmkernels.pretrain.views import Captions

RECIPE = Recipe(
    "Answer questions about an image that the question's words attend to (--fusion.layers 0: without it)",
    source="Antol et al. 2015, arXiv:1505.00468",
    data="scenes",
    streams={
        "image": Stream(Patches(size=48, patch=8)),
        "question": Stream(Words(), views=(Captions(),)),
    },
    fusion=Cross(into=("question",), context="image", layers=2),
    objectives={"answer": Answer("question", label="answer")},
    metrics=(Predictions("answer"), Groups(Predictions("answer"), "kind")),
    settings={"batch": 64, "chunk": 64, "steps": 3000, "eval_every": 1000, "eval_limit": 512},
)
