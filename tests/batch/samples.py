"""Samples of text, images, an audio recording and a video clip."""

import torch
from torch import Tensor

from mmkernels import Media, Modality, PackedBatch

IMAGE, AUDIO, VIDEO = Modality.IMAGE, Modality.AUDIO, Modality.VIDEO


def text(*ids: int) -> Tensor:
    return torch.tensor(ids, dtype=torch.int64)


def image(t: int, h: int, w: int, merge: int = 2, modality: int = IMAGE, fill: float = 1.0) -> Media:
    return Media(modality, torch.full((t * h * w, 12), fill), (t, h, w), merge_size=merge)


def audio(frames: int, tokens: int) -> Media:
    return Media(AUDIO, torch.arange(frames * 5.0).reshape(frames, 5), tokens=tokens)


def samples() -> list:
    return [
        [text(1, 2), image(1, 4, 6, fill=1.0), text(3)],
        text(4, 5, 6),
        [audio(7, 3), text(7), image(1, 2, 2, fill=2.0), image(1, 4, 4, fill=3.0)],
        [],
        [image(4, 2, 4, modality=VIDEO, fill=4.0), text(8, 9)],
    ]


def a_batch(**options) -> PackedBatch:
    options = {"capacity": 40, "placeholder": {IMAGE: 91, AUDIO: 92, VIDEO: 93}, "pad_token": 99} | options
    return PackedBatch.from_samples(samples(), **options)
