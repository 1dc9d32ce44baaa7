from mmkernels.pretrain.encoders import HashedWords, Patches, Spectrogram
from mmkernels.pretrain.metrics import Retrieval
from mmkernels.pretrain.objectives import Contrast
from mmkernels.pretrain.recipe import Recipe, Stream
from mmkernels.pretrain.views import Augment, Captions, WarpSound

RECIPE = Recipe(
    "Contrast images, names and speech with each other in one space",
    source="Guzhov et al. 2021, arXiv:2106.13043",
    data="speech",
    streams={
        "image": Stream(Patches(), views=(Augment(),)),
        "text": Stream(HashedWords(), views=(Captions(),)),
        "audio": Stream(Spectrogram(layers=3), views=(WarpSound(),)),
    },
    objectives={
        "image_text": Contrast("image", "text"),
        "audio_text": Contrast("audio", "text"),
        "audio_image": Contrast("audio", "image"),
    },
    metrics=(Retrieval("audio", "text"), Retrieval("audio", "image"), Retrieval("image", "text")),
    settings={"steps": 400, "chunk": 128},
)
