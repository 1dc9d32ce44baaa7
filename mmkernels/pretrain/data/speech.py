"""The embedded speech: 510 names of emoji spoken by seven synthetic voices, with the drawings they name.

```python
data = open_speech()
data.train[0].values   # {"audio": float32 [frames, 40], "text": Text((name,)), "image": uint8 [48, 48, 4], "voice": 0}
```

| split | held out of training | utterances |
|---|---|---|
| voice | a voice, with an accent of its own | it speaks the seen names |
| names | names: concepts of the emoji pack's held-out families | the seen voices speak them |

`scripts/build_speech.py` builds the pack; how it was made and licences are in `speech/ATTRIBUTION.md`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import NamedTuple

import numpy as np

from mmkernels.pretrain.data.base import BrokenLog, Data, Sample, Source, Text
from mmkernels.pretrain.data.emoji import HELD_OUT_VENDOR, EmojiDataset, load_pack

__all__ = ["SpeechPack", "SpeechSource", "load_speech", "open_speech"]


class SpeechPack(NamedTuple):
    """The utterances, by voice and then by concept; utterance `i` has the frames `starts[i]` to `starts[i + 1]`."""

    voices: tuple[str, ...]
    held_out_voice: str
    voice: np.ndarray  # int64 [n], an index into `voices`
    concepts: np.ndarray  # int64 [n], of the emoji pack
    starts: np.ndarray  # int64 [n + 1]
    levels: np.ndarray  # uint8 [frames, mels]: `floor + step * level` dB below the utterance's loudest
    floor: float  # dB
    step: float  # dB
    mean: np.ndarray  # float32 [mels]: dB, of the training utterances
    deviation: np.ndarray  # float32 [mels]: dB
    hop: float  # seconds from frame to frame


@cache
def load_speech() -> SpeechPack:
    """Read the embedded speech (3 MB in memory, kept)."""
    path = resources.files(__package__) / "speech" / "speech.npz"
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        table = json.loads(arrays["table"].tobytes())
        return SpeechPack(
            voices=tuple(table["voices"]),
            held_out_voice=table["held_out_voice"],
            voice=arrays["voices"].astype(np.int64),
            concepts=arrays["concepts"].astype(np.int64),
            starts=np.concatenate([[0], np.cumsum(arrays["lengths"], dtype=np.int64)]),
            levels=arrays["levels"],
            floor=table["floor"],
            step=table["step"],
            mean=np.array(table["mean"], np.float32),
            deviation=np.array(table["deviation"], np.float32),
            hop=table["hop_seconds"],
        )


class SpeechSource(Source):
    """The utterances of some concepts' names by some voices.

    Fields: `audio`, the log-mel spectrogram, float32 [frames, 40], less the training utterances' mean and divided by
    their deviation, mel by mel, so that zeros are an average frame; `text`, the name; `image`, a drawing of the concept
    by a training vendor; `voice`. A name's utterances show the vendors in turn.

    Args:
        voices: names of voices in the pack.
        concepts: int64, the requested concepts of the emoji pack; the pack may lack an utterance of some.

    Raises:
        ValueError: an unknown or repeated voice.
    """

    fields = ("audio", "text", "image", "voice")

    def __init__(self, voices: Sequence[str], concepts: np.ndarray) -> None:
        self._speech = speech = load_speech()
        if not set(voices) <= set(speech.voices) or len(set(voices)) != len(voices):
            raise ValueError(f"voices: expected different ones of {list(speech.voices)}, got {list(voices)}")
        self.classes = {"voice": speech.voices}
        chosen = np.isin(speech.voice, [speech.voices.index(voice) for voice in voices])
        self._rows = np.flatnonzero(chosen & np.isin(speech.concepts, concepts))
        self.concepts = speech.concepts[self._rows]
        self.broken = BrokenLog(len(self._rows), 0.0)
        self._drawings = EmojiDataset([v for v in load_pack().vendors if v != HELD_OUT_VENDOR], self.concepts)
        self._drawn = self._choose_drawings()

    def _choose_drawings(self) -> np.ndarray:
        """For each utterance an index into the drawings, int64 [n]."""
        of_concept: dict[int, list[int]] = {}
        for drawing, concept in enumerate(self._drawings.concepts.tolist()):
            of_concept.setdefault(concept, []).append(drawing)
        turns = {concept: concept for concept in of_concept}  # else every name would begin with the same vendor
        chosen = []
        for concept in self.concepts.tolist():
            chosen.append(of_concept[concept][turns[concept] % len(of_concept[concept])])
            turns[concept] += 1
        return np.array(chosen, np.int64)

    def __getitem__(self, index: int) -> Sample:
        row, concept = int(self._rows[index]), int(self.concepts[index])
        speech = self._speech
        levels = speech.levels[speech.starts[row] : speech.starts[row + 1]].astype(np.float32)
        audio = (levels * np.float32(speech.step) + np.float32(speech.floor) - speech.mean) / speech.deviation
        values = {
            "audio": audio,
            "text": Text((load_pack().names[concept],)),
            "image": self._drawings[int(self._drawn[index])].image,
            "voice": int(speech.voice[row]),
        }
        return Sample(values, concept, self.name(index))

    def name(self, index: int) -> str:
        voice = self._speech.voices[self._speech.voice[self._rows[index]]]
        return f"{voice}/{load_pack().names[int(self.concepts[index])]}"


def open_speech() -> Data:
    """Training utterances, and the held-out splits "voice" and "names" (see the module)."""
    speech, emoji = load_speech(), load_pack()
    seen = np.setdiff1d(np.arange(len(emoji.names)), emoji.held_out)
    voices = [voice for voice in speech.voices if voice != speech.held_out_voice]
    held_out: dict[str, Source] = {
        "voice": SpeechSource([speech.held_out_voice], seen),
        "names": SpeechSource(voices, emoji.held_out),
    }
    return Data(SpeechSource(voices, seen), held_out)
