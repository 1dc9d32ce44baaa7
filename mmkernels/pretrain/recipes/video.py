from mmkernels.pretrain.encoders import HashedWords, Tubelets, Words
from mmkernels.pretrain.fusion import Cross
from mmkernels.pretrain.metrics import Groups, Predictions, Retrieval
from mmkernels.pretrain.objectives import Answer, Contrast
from mmkernels.pretrain.recipe import Recipe, Stream
from mmkernels.pretrain.views import Captions

RECIPE = Recipe(
    "Clips with their captions, their actions, and questions about them",
    source="Arnab et al. 2021, arXiv:2103.15691; Xu et al. 2021 (VideoCLIP), arXiv:2109.14084",
    data="motion",
    streams={
        "video": Stream(Tubelets(layers=3)),
        "text": Stream(HashedWords(), views=(Captions(),)),
        "question": Stream(Words(), project="none"),
    },
    fusion=Cross(into=("question",), context="video", layers=2),
    objectives={
        "contrast": Contrast("video", "text"),
        "action": Answer(read="video", label="action"),
        "answer": Answer(read="question", label="answer"),
    },
    metrics=(
        Retrieval("video", "text"),
        Predictions("action"),
        Predictions("answer"),
        Groups(Predictions("answer"), "kind"),
    ),
    settings={"batch": 64, "steps": 500, "eval_limit": 256},
)
