from mmkernels.pretrain.encoders import Words
from mmkernels.pretrain.fusion import Merged
from mmkernels.pretrain.metrics import Predictions
from mmkernels.pretrain.objectives import MaskedTokens
from mmkernels.pretrain.recipe import Recipe, Stream
from mmkernels.pretrain.views import MaskWords

RECIPE = Recipe(
    "Two languages in one stream, in which a token sees the other language alone: a masked word needs its translation",
    source="Ouyang et al. 2021, arXiv:2012.15674",
    data="languages",
    streams={
        # Without layers of their own: these would see the same language.
        "text": Stream(Words(layers=0), views=(MaskWords(0.3, when=("english",)),)),
        "text_b": Stream(Words(layers=0), views=(MaskWords(0.3, when=("other",)),), tied="text"),
    },
    fusion=Merged(("text", "text_b"), layers=2, mask="cross_only"),
    objectives={"english": MaskedTokens("text"), "other": MaskedTokens("text_b")},
    draw=True,  # the other language is whole: names are short
    metrics=(Predictions("english"), Predictions("other")),
    settings={"batch": 128, "chunk": 128, "steps": 1500, "eval_every": 500, "vocabulary": 1024, "lr": 3e-3},
)
