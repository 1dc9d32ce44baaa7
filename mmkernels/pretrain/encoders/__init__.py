"""From the values of a field to packed tokens, and from these to features."""

from mmkernels.pretrain.encoders.adapted import Adapted
from mmkernels.pretrain.encoders.documents import DocumentImages, DocumentWords
from mmkernels.pretrain.encoders.frozen import Frozen
from mmkernels.pretrain.encoders.graph import Graph
from mmkernels.pretrain.encoders.hashed_words import HashedWords
from mmkernels.pretrain.encoders.module import Module
from mmkernels.pretrain.encoders.patches import Patches
from mmkernels.pretrain.encoders.regions import Regions
from mmkernels.pretrain.encoders.spectrogram import Spectrogram
from mmkernels.pretrain.encoders.tubelets import Tubelets
from mmkernels.pretrain.encoders.word_vectors import WordVectors
from mmkernels.pretrain.encoders.words import Words

__all__ = [
    "Adapted",
    "DocumentImages",
    "DocumentWords",
    "Frozen",
    "Graph",
    "HashedWords",
    "Module",
    "Patches",
    "Regions",
    "Spectrogram",
    "Tubelets",
    "WordVectors",
    "Words",
]
