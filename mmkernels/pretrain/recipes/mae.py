from mmkernels.pretrain.encoders import Patches
from mmkernels.pretrain.metrics import LinearProbe, Reconstruction
from mmkernels.pretrain.objectives import MaskedPatches
from mmkernels.pretrain.recipe import Recipe, Stream
from mmkernels.pretrain.views import MaskPatches, RandomCrop

RECIPE = Recipe(
    "Paint three quarters of an image from the visible rest, which alone is encoded",
    source="He et al. 2022, arXiv:2111.06377",
    data="emoji",
    streams={
        "image": Stream(
            Patches(layers=4, patch=4, stem="linear"),
            views=(RandomCrop(brightness=0, contrast=0, saturation=0, hue=0, grey=0), MaskPatches(share=0.75)),
            project="none",
        )
    },
    objectives={"patches": MaskedPatches("image", layers=2)},
    metrics=(Reconstruction("patches"), LinearProbe("image")),
    settings={"batch": 64, "steps": 2000, "eval_every": 1000},
)
