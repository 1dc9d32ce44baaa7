# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.26"]
# ///
"""Build the embedded speech: names of emoji spoken by seven voices of eSpeak NG, as log-mel spectrograms.

    python scripts/build_speech.py            # writes mmkernels/pretrain/data/speech/
    python scripts/build_speech.py --check    # rebuilds in memory and compares with the committed pack

Input: names of the committed emoji pack, and eSpeak NG 1.52 from the PyPI package espeakng-loader, pinned by version
and hash. Output: `speech.npz` (levels of 1.5 dB, readable with NumPy alone), `LICENSES/`, `ATTRIBUTION.md`. Needs
`pip`, and Linux on x86-64: the library's noise comes from the C library's generator, and other builds of it may round
differently. Reading the pack needs neither.
"""

from __future__ import annotations

import ctypes
import hashlib
import multiprocessing
import re
import subprocess
import sys
import tempfile
import zipfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from log_mel import HOP, MELS, RATE, log_mel
from pack_files import DATA, Pack, emoji_table, finish, json_array, parser_of, verified

WHEEL, VERSION = "espeakng-loader", "0.2.4"
SHA256 = "08721baf27d13d461f6be6eed9a65277e70d68234ff484fd8b9897b222cdcb6d"
FLOOR, STEP = -60.0, 1.5  # dB: silence, and the difference between levels, whose rounding error is 0.43 dB
SEEN, UNSEEN = 440, 70  # names of the emoji pack's seen and held-out concepts
SPOKEN = 3  # voices that speak each name, besides the held-out voice: more names teach more than more voices of each
HELD_OUT_VOICE = "rp-f3"


VOICES = {  # name in the pack -> eSpeak NG's accent and speaker
    "us": "en-us",
    "gb-f2": "gmw/en+f2",
    "scotland-m4": "en-gb-scotland+m4",
    "caribbean-f4": "en-029+f4",
    "nyc-m3": "en-us-nyc+m3",
    "lancaster-alicia": "en-gb-x-gbclan+Alicia",
    HELD_OUT_VOICE: "en-gb-x-rp+f3",
}

ATTRIBUTION = f"""# Attribution

`speech.npz` contains spectrograms of names that were spoken by the speech synthesiser eSpeak NG 1.52
(https://github.com/espeak-ng/espeak-ng, Jonathan Duddington, Reece H. Dunn and contributors), taken from the package
`{WHEEL}` {VERSION}. They do not endorse this project.

eSpeak NG is licensed under the GNU General Public License, version 3 or later. That licence covers the program and its
data, of which nothing is in the pack, and not the program's output: "the output from running a covered work is covered
by this License only if the output, given its content, constitutes a covered work" (section 2). The synthesiser computes
vowels from formants and mixes short recordings into consonants; of both a spectrogram keeps {MELS} coarse levels for
each 20 ms, from which no part of the program or its data can be recovered. Like the rest of this project the
spectrograms are licensed under Apache-2.0.

The spoken names are Emojibase's (MIT, Miles Johnson, https://github.com/milesj/emojibase,
`LICENSES/MIT-emojibase.txt`); the pack refers to them by their place in `emoji/emoji.npz`.

**Modified:** the spoken names became spectrograms, silence at their ends was cut off, and levels were rounded to
{STEP} dB. The changes were made by `scripts/build_speech.py`.
"""


class Utterance(NamedTuple):
    voice: str
    concept: int
    text: str

    @property
    def draw(self) -> bytes:
        return hashlib.blake2b(f"{self.voice}/{self.text}".encode()).digest()

    @property
    def words_per_minute(self) -> int:
        return 145 + self.draw[0] % 46  # 145..190

    @property
    def pitch(self) -> int:
        return 42 + self.draw[1] % 17  # 42..58 of 0..100, relative to the voice's own; eSpeak NG's default is 50


def order(texts: list[str]) -> list[str]:
    return sorted(texts, key=lambda text: hashlib.blake2b(text.encode()).digest())


def utterances() -> list[Utterance]:
    """Names of one or two words, chosen by hash, each spoken by three voices, seen ones by the held-out voice too."""
    table = emoji_table()
    names, unseen = table["names"], {table["names"][i] for i in table["held_out"]}
    short = order([name for name in names if re.fullmatch("[A-Za-z]+(?:[ -][A-Za-z]+)?", name)])
    chosen = [name for name in short if name not in unseen][:SEEN] + [name for name in short if name in unseen][:UNSEEN]
    found = []
    for name in chosen:
        voices = order([f"{name}/{voice}" for voice in VOICES if voice != HELD_OUT_VOICE])[:SPOKEN]
        spoken = {voice.partition("/")[2] for voice in voices} | (set() if name in unseen else {HELD_OUT_VOICE})
        found += [Utterance(voice, names.index(name), name) for voice in spoken]
    return sorted(found, key=lambda u: (list(VOICES).index(u.voice), u.concept))


def speak(utterance: Utterance, folder: Path) -> np.ndarray:
    """The waveform, int16 [samples] at `RATE` Hz.

    To be called in a process of its own: the library carries random state and echoes from one utterance to the next.
    """
    library = ctypes.CDLL(str(folder / "libespeak-ng.so"))
    chunks: list[np.ndarray] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def collect(samples, count, events):  # type: ignore[no-untyped-def]
        if samples and count > 0:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    synchronous, by_character, utf8, rate, pitch = 2, 1, 1, 1, 3  # of speak_lib.h
    if library.espeak_Initialize(synchronous, 0, str(folder).encode(), 0) != RATE:
        raise RuntimeError(f"espeak_Initialize: expected {RATE} Hz")
    library.espeak_SetSynthCallback(collect)
    if library.espeak_SetVoiceByName(VOICES[utterance.voice].encode()):
        raise RuntimeError(f"espeak_SetVoiceByName: no voice {VOICES[utterance.voice]!r}")
    library.espeak_SetParameter(rate, utterance.words_per_minute, 0)
    library.espeak_SetParameter(pitch, utterance.pitch, 0)
    library.espeak_ng_SetRandSeed(ctypes.c_long(1))
    text = utterance.text.encode() + b"\0"
    if library.espeak_Synth(text, ctypes.c_size_t(len(text)), 0, by_character, 0, utf8, None, None):
        raise RuntimeError(f"espeak_Synth: could not speak {utterance.text!r}")
    return np.concatenate(chunks)


def levels_of(utterance: Utterance, folder: Path) -> np.ndarray:
    """The spectrogram as levels above `FLOOR`, uint8 [frames, MELS]."""
    decibels = log_mel(speak(utterance, folder))
    return np.rint((np.maximum(decibels, FLOOR) - FLOOR) / STEP).astype(np.uint8)


def build() -> Pack:
    spoken = utterances()
    with tempfile.TemporaryDirectory() as folder:
        spec = ["--no-deps", "--only-binary", ":all:", "--platform", "manylinux2014_x86_64", f"{WHEEL}=={VERSION}"]
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "-d", folder, *spec], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(verified(wheel, SHA256)) as archive:
            archive.extractall(folder)
        run = partial(levels_of, folder=Path(folder, "espeakng_loader"))
        with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
            levels = pool.map(run, spoken, chunksize=1)
    lengths = np.array([len(each) for each in levels], np.int16)
    held_out = np.isin([u.concept for u in spoken], emoji_table()["held_out"])
    training = [
        each for each, u, out in zip(levels, spoken, held_out, strict=True) if u.voice != HELD_OUT_VOICE and not out
    ]
    frames = np.concatenate(training).astype(np.float64) * STEP + FLOOR
    table = {
        "voices": list(VOICES),
        "held_out_voice": HELD_OUT_VOICE,
        "floor": FLOOR,
        "step": STEP,
        "hop_seconds": HOP / RATE,
        "mean": np.round(frames.mean(0), 2).tolist(),  # dB by mel, of the training utterances
        "deviation": np.round(frames.std(0), 2).tolist(),
    }
    arrays = {
        "table": json_array(table),
        "voices": np.array([list(VOICES).index(u.voice) for u in spoken], np.uint8),
        "concepts": np.array([u.concept for u in spoken], np.int16),
        "lengths": lengths,
        "levels": np.concatenate(levels),
    }
    licence = (DATA / "emoji" / "LICENSES" / "MIT-emojibase.txt").read_text(encoding="utf-8")
    return Pack(arrays, ATTRIBUTION, {"MIT-emojibase.txt": licence}, zipfile.ZIP_BZIP2)


def main() -> None:
    args = parser_of(__doc__).parse_args()
    finish(build, DATA / "speech" / "speech.npz", args.check)


if __name__ == "__main__":
    main()
