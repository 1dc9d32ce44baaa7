from mmkernels.pretrain.encoders import Words
from mmkernels.pretrain.fusion import Merged
from mmkernels.pretrain.metrics import Ablation, Matched, Predictions
from mmkernels.pretrain.objectives import MaskedTokens
from mmkernels.pretrain.recipe import Recipe, Stream
from mmkernels.pretrain.views import MaskWords

RECIPE = Recipe(
    "Two languages in one stream, in which a token sees the other language alone: a masked word needs its translation",
    source="Ouyang et al. 2021, arXiv:2012.15674",
    data="languages",
    streams={
        # Without layers of their own: these would see the same language. English is predicted, the other is whole: from
        # English alone nothing says which of the languages is asked for.
        "text": Stream(Words(layers=0), views=(MaskWords(0.3),)),
        "text_b": Stream(Words(layers=0), tied="text"),
    },
    fusion=Merged(("text", "text_b"), layers=2, mask="cross_only"),
    objectives={"words": MaskedTokens("text")},
    metrics=(Matched("words", "text", "text_b"), Predictions("words"), Ablation("words", stream="text_b")),
    # Whole words as tokens: a token cannot be composed with its neighbours, which it does not see.
    settings={"batch": 128, "chunk": 128, "steps": 3000, "eval_every": 0, "vocabulary": 8192, "eval_limit": 256},
)
