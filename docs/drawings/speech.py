"""Draw `docs/images/speech.svg`: names as three voices speak them.

    python docs/drawings/speech.py            # writes the picture
    python docs/drawings/speech.py --check    # draws in memory and compares

Needs `mmkernels[plot]`.
"""

from __future__ import annotations

import argparse
import sys

import matplotlib.pyplot as plt
import numpy as np
from draw_tilings import IMAGES, svg
from matplotlib.figure import Figure

from mmkernels.pretrain.data.speech import SpeechSource, load_speech

NAMES, VOICES = 3, 3


def shared_names(voices: list[str]) -> tuple[list[SpeechSource], list[int]]:
    """Each voice's utterances, and the first concepts of one-word names that all of them speak."""
    sources = [SpeechSource([voice], np.arange(10_000)) for voice in voices]
    common = set.intersection(*(set(source.concepts.tolist()) for source in sources))
    first = sources[0]
    words = [i for i in range(len(first)) if int(first.concepts[i]) in common and " " not in first[i].captions[0]]
    return sources, [int(first.concepts[i]) for i in words[:NAMES]]


def draw() -> Figure:
    pack = load_speech()
    sources, concepts = shared_names(["nyc-m3", "gb-f2", pack.held_out_voice][:VOICES])
    longest = max(np.diff(pack.starts)[np.isin(pack.concepts, concepts)])
    figure, axes = plt.subplots(
        NAMES, VOICES + 1, figsize=(8, 4), width_ratios=[1, *[2] * VOICES], layout="constrained"
    )
    for i, (row, concept) in enumerate(zip(axes, concepts, strict=True)):
        for axis, source in zip(row[1:], sources, strict=True):
            sample = source[source.concepts.tolist().index(concept)]
            decibels = sample.values["audio"] * pack.deviation + pack.mean
            seconds = len(decibels) * pack.hop
            axis.imshow(
                decibels.T,
                origin="lower",
                aspect="auto",
                cmap="magma",
                interpolation="none",
                extent=(0, seconds, 0, 40),
            )
            axis.set(xlim=(0, longest * pack.hop), yticks=[])
            axis.spines[["top", "right", "left"]].set_visible(False)
            if i == 0:
                held_out = " (held out)" if sample.name.startswith(pack.held_out_voice) else ""
                axis.set_title(sample.name.partition("/")[0] + held_out)
            if i == NAMES - 1:
                axis.set_xlabel("seconds")
            else:
                axis.set_xticklabels([])
        row[0].imshow(sample.image, interpolation="none")
        row[0].set_title(sample.captions[0])
        row[0].axis("off")
    return figure


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed picture instead of writing")
    check = parser.parse_args().check
    path, text = IMAGES / "speech.svg", svg(draw())
    if not check:
        path.write_text(text, encoding="utf-8")
        return 0
    if path.read_text(encoding="utf-8") != text:
        print(f"out of date: {path.name}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
