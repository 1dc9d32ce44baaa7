"""The speech is intact and intelligible, each name is heard as often as promised, and the splits are disjoint."""

from __future__ import annotations

import hashlib
import importlib.util
from collections import Counter
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from mmkernels.pretrain.data.base import Source, Text
from mmkernels.pretrain.data.emoji import HELD_OUT_VENDOR, load_pack
from mmkernels.pretrain.data.speech import SpeechSource, load_speech, open_speech

ROOT = Path(__file__).resolve().parents[2]
FOLDER = resources.files("mmkernels.pretrain.data") / "speech"


def test_pack_is_the_one_that_was_reviewed() -> None:
    data = (FOLDER / "speech.npz").read_bytes()
    assert hashlib.sha256(data).hexdigest() == "891a71b3547ced5bdb0c9aeef3b0a97f7387a86072bbf40cf0b02c89bec05edf"
    assert len(data) < 1_500_000


def test_utterances_are_complete_and_trimmed() -> None:
    pack = load_speech()
    lengths = np.diff(pack.starts)
    assert len(pack.voice) == len(pack.concepts) == len(lengths) == 1970
    assert pack.levels.shape == (pack.starts[-1], 40)
    assert pack.levels.dtype == np.uint8
    assert 10 <= lengths.min() <= lengths.max() <= 100  # 0.2 to 2 seconds
    assert pack.hop == pytest.approx(0.02)
    loudest = np.maximum.reduceat(pack.levels.max(1), pack.starts[:-1])
    assert (pack.floor + pack.step * loudest == 0).all()
    ends = np.concatenate([pack.starts[:-1], pack.starts[1:] - 1])
    assert (pack.floor + pack.step * pack.levels[ends].max(1)).min() >= -45


def test_each_name_is_spoken_by_three_voices_and_the_held_out_one() -> None:
    pack, held_out = load_speech(), set(load_pack().held_out.tolist())
    spoken: dict[int, list[str]] = {}
    for voice, concept in zip(pack.voice, pack.concepts.tolist(), strict=True):
        spoken.setdefault(concept, []).append(pack.voices[voice])
    assert len(spoken) == 510
    for concept, voices in spoken.items():
        assert len(set(voices)) == len(voices)
        assert len(set(voices) - {pack.held_out_voice}) == 3
        assert (pack.held_out_voice in voices) == (concept not in held_out)
    per_voice = Counter(voice for voices in spoken.values() for voice in voices)
    assert min(per_voice.values()) > 200


def test_splits_hold_out_a_voice_and_names() -> None:
    pack, data = load_speech(), open_speech()
    held_out = set(load_pack().held_out.tolist())
    voice, names = data.held_out["voice"], data.held_out["names"]
    assert (len(data.train), len(voice), len(names)) == (1320, 440, 210)
    assert set(voice.concepts.tolist()) == set(data.train.concepts.tolist())
    assert not set(data.train.concepts.tolist()) & held_out
    assert set(names.concepts.tolist()) <= held_out

    def voices(source: Source) -> set[str]:
        return {source.name(i).partition("/")[0] for i in range(len(source))}

    assert voices(voice) == {pack.held_out_voice}
    assert voices(data.train) == voices(names) == set(pack.voices) - {pack.held_out_voice}


def test_training_audio_is_normalised() -> None:
    train = open_speech().train
    frames = np.concatenate([train[i].values["audio"] for i in range(len(train))])
    assert frames.dtype == np.float32
    np.testing.assert_allclose(frames.mean(0), 0, atol=0.01)
    np.testing.assert_allclose(frames.std(0), 1, atol=0.01)


def test_sample_is_what_the_pack_holds() -> None:
    pack, emoji, train = load_speech(), load_pack(), open_speech().train
    assert train.fields == ("audio", "text", "image", "voice")
    for index in (0, 700, len(train) - 1):
        sample = train[index]
        voice, _, name = sample.name.partition("/")
        concept = emoji.names.index(name)
        assert sample.concept == train.concepts[index] == concept
        assert set(sample.values) == set(train.fields)
        assert sample.values["text"] == Text((name,))
        assert train.classes["voice"][sample.values["voice"]] == voice
        row = int(np.flatnonzero((pack.voice == pack.voices.index(voice)) & (pack.concepts == concept))[0])
        decibels = sample.values["audio"] * pack.deviation + pack.mean
        levels = pack.levels[pack.starts[row] : pack.starts[row + 1]]
        np.testing.assert_allclose(decibels, levels * pack.step + pack.floor, atol=1e-4)


def test_utterances_of_a_name_show_different_training_vendors() -> None:
    emoji, train = load_pack(), open_speech().train
    vendors = [vendor for vendor in emoji.vendors if vendor != HELD_OUT_VENDOR]
    shown: dict[int, set[str]] = {}
    drawn: dict[int, set[str]] = {}
    for i in range(len(train)):
        sample = train[i]
        for vendor in vendors:
            drawings = emoji.vendors[vendor]
            for row in np.flatnonzero(drawings.concepts == sample.concept):
                drawn.setdefault(sample.concept, set()).add(vendor)
                if np.array_equal(drawings.palette[drawings.indices[row]], sample.image):
                    shown.setdefault(sample.concept, set()).add(vendor)
    assert {concept: len(found) for concept, found in shown.items()} == {
        concept: min(3, len(found)) for concept, found in drawn.items()
    }


def test_the_held_out_voice_can_be_understood() -> None:
    """The nearest training utterance, stretched to the same length, mostly has the same name (chance: 0.2%)."""
    data = open_speech()

    def templates(source: Source) -> np.ndarray:
        rows = []
        for i in range(len(source)):
            audio = source[i].values["audio"]
            place = np.linspace(0, len(audio) - 1, 16).round().astype(int)
            row = (audio[place] - audio[place].mean(0)).ravel()
            rows.append(row / np.linalg.norm(row))
        return np.stack(rows)

    nearest = (templates(data.held_out["voice"]) @ templates(data.train).T).argmax(1)
    assert (data.train.concepts[nearest] == data.held_out["voice"].concepts).mean() > 0.7


def test_features_are_the_documented_ones() -> None:
    """A tone has its peak in the mel that holds it, at 0 dB; silence around it is cut off."""
    spec = importlib.util.spec_from_file_location("log_mel", ROOT / "scripts" / "log_mel.py")
    assert spec is not None
    assert spec.loader is not None
    features = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(features)
    edges = 700 * (10 ** (np.linspace(*(2595 * np.log10(1 + np.array([60, 8000]) / 700)), 42) / 2595) - 1)
    silence = np.zeros(22_050, np.int16)
    for mel in (3, 20, 38):
        tone = 10_000 * np.sin(2 * np.pi * edges[mel + 1] * np.arange(22_050) / 22_050)
        levels = features.log_mel(np.concatenate([silence, tone.astype(np.int16), silence]))
        assert 50 <= len(levels) <= 52
        assert (levels.argmax(1)[2:-2] == mel).all()
        assert levels.max() == 0


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"voices: expected different ones of \['us', .*\], got \['alto'\]"):
        SpeechSource(["alto"], np.arange(3))
    with pytest.raises(ValueError, match=r"voices: expected different ones of .*, got \['us', 'us'\]"):
        SpeechSource(["us", "us"], np.arange(3))
    assert len(SpeechSource([], np.arange(3))) == len(SpeechSource(["us"], np.zeros(0, np.int64))) == 0


def test_licence_travels_with_the_pack() -> None:
    attribution = (FOLDER / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert "eSpeak NG" in attribution
    assert "Modified" in attribution
    assert "Miles Johnson" in (FOLDER / "LICENSES" / "MIT-emojibase.txt").read_text(encoding="utf-8")
