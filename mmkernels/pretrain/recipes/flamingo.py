from mmkernels.pretrain.encoders import DocumentImages, DocumentWords, Patches, Words
from mmkernels.pretrain.fusion import Gated
from mmkernels.pretrain.metrics import Ablation, Predictions, Shots
from mmkernels.pretrain.objectives import NextToken
from mmkernels.pretrain.recipe import Recipe, Stage, Stream

RECIPE = Recipe(
    "A language model of interleaved documents; once it is frozen, its layers learn to read the images through gates",
    source="Alayrac et al. 2022, arXiv:2204.14198",
    data="scenes",
    streams={
        "text": Stream(DocumentWords(Words(layers=0, causal=True)), field="document"),
        "image": Stream(DocumentImages(Patches()), field="document"),
    },
    fusion=Gated(into="text", context="image", layers=4, every=2),
    objectives={"words": NextToken("text")},
    metrics=(Predictions("words"), Ablation("words", "image"), Shots("words", most_tokens=20)),
    stages=(
        Stage(until=200, trainable=("streams.text.*", "fusion.layers.*", "objectives.*")),
        Stage(trainable=("streams.image.*", "fusion.gates.*")),
    ),
    settings={"batch": 32, "chunk": 32, "steps": 2000, "eval_every": 1000, "eval_limit": 256},
)
