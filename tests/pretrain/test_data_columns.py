"""Your own data with other columns than images and captions: texts, labels, sounds, clips, regions, vectors."""

from __future__ import annotations

import io
import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pretrain_data import png, shard

from mmkernels.pretrain.data import FolderDataset, Text, TooManyBrokenError, WebDataset, open_data
from mmkernels.pretrain.data.audio import HIGHEST, LOWEST, MELS, decode_audio, log_mel
from mmkernels.pretrain.data.base import BrokenImageError
from mmkernels.pretrain.data.cells import Reading
from mmkernels.pretrain.data.decode import decode_video


def table(folder: Path, rows: list[dict[str, Any]], images: int = 4) -> Path:
    for i in range(images):
        (folder / f"{i}.png").write_bytes(png(i))
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")
    return folder


def tone(hertz: float, seconds: float = 0.5, rate: int = 16_000) -> bytes:
    samples = (16_000 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.int16)
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return out.getvalue()


def clip(shades: list[int]) -> bytes:
    out = io.BytesIO()
    first, *others = [Image.new("RGB", (6, 4), (shade, 0, 0)) for shade in shades]
    first.save(out, "WEBP", save_all=True, append_images=others, lossless=True)
    return out.getvalue()


# ------------------------------------------------------------------------------------------------ texts and labels

QUESTIONS = [
    {"image": "0.png", "question": "which?", "answer": "pear", "id": 7},
    {"image": "0.png", "question": ["how many?", "what number?"], "answer": 3},
    {"image": "1.png", "question": "which?", "answer": None},
    {"question": "no picture", "answer": "apple"},
]


def test_questions_and_answers(tmp_path: Path) -> None:
    data = FolderDataset(table(tmp_path, QUESTIONS), fields=("image", "question"), labels=("answer",))
    assert data.fields == ("image", "question", "answer")
    assert data.classes == {"answer": ("3", "apple", "pear")}
    first, second, third, last = data.read(range(4))
    assert first.values["answer"] == 2
    assert second.values["question"] == Text(("how many?", "what number?"))
    assert sorted(third.values) == ["image", "question"]
    assert sorted(last.values) == ["answer", "question"]
    assert last.name == "rows.jsonl: line 4"
    assert data.concepts.tolist() == [0, 0, 1, 2]  # a row each, and rows of one image are alike
    assert data.peek(0) == {"image": ..., "question": Text(("which?",)), "answer": 2}


def test_a_csv_by_the_same_names(tmp_path: Path) -> None:
    table(tmp_path, [])
    (tmp_path / "rows.jsonl").unlink()
    (tmp_path / "t.csv").write_text("id,question,answer,image\n1,which?,pear,0.png\n2,,fig,1.png\n", encoding="utf-8")
    data = FolderDataset(tmp_path, fields=("image", "question"), labels=("answer",))
    assert [sorted(sample.values) for sample in data.read(range(2))] == [
        ["answer", "image", "question"],
        ["answer", "image"],
    ]
    expected = r"t.csv: line 2: expected the columns 'image' and 'topic', got \['id', 'question', 'answer', 'image'\]"
    with pytest.raises(ValueError, match=expected):
        FolderDataset(tmp_path, fields=("image", "topic"))


def test_what_is_read_unless_asked_for(tmp_path: Path) -> None:
    rows = [{"image": "0.png", "text": "a pear", "question": "which?", "answer": "pear"}]
    assert FolderDataset(table(tmp_path, rows)).fields == ("image", "text", "question")
    assert FolderDataset(tmp_path, fields=("text",)).read([0])[0].values == {"text": Text(("a pear",))}
    assert FolderDataset(tmp_path, labels=("answer",)).fields == ("image", "text", "question", "answer")
    assert Reading.of(["audio"]).columns.keys() == {"audio"}
    assert Reading.of(["file", "caption"]).pairs
    with pytest.raises(ValueError, match="fields: expected fields that columns can hold, got 'document'"):
        FolderDataset(tmp_path, fields=("document",))


def test_a_column_without_a_value_is_refused(tmp_path: Path) -> None:
    table(tmp_path, QUESTIONS)
    with pytest.raises(ValueError, match=r"expected values in every field that is read, got none in 'topic'"):
        FolderDataset(tmp_path, fields=("image", "topic"), max_broken=1.0)
    with pytest.raises(TooManyBrokenError, match=r"line 4: expected a value in some of the columns 'image', got none"):
        FolderDataset(tmp_path, fields=("image",))


def test_classes_are_those_of_the_training_data(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": f"thing {i}", "kind": f"kind {i}"} for i in range(40)]
    data = open_data(table(tmp_path, rows, 0), fields=("text",), labels=("kind",), eval_fraction=0.2)
    held_out = data.held_out["held_out"]
    assert len(data.train.classes["kind"]) == len(data.train) == 40 - len(held_out)
    for sample in data.train.read(range(3)):
        assert data.train.classes["kind"][sample.values["kind"]] == sample.captions[0].replace("thing", "kind")
    assert all("kind" not in held_out[i].values for i in range(len(held_out)))
    assert len(held_out) > 1
    assert f"held_out: {len(held_out)} samples have no kind: kind" in caplog.text


# ------------------------------------------------------------------------------------------------ sounds and clips


def test_log_mel_finds_a_tone() -> None:
    bounds = 2595 * np.log10(1 + np.array([LOWEST, HIGHEST]) / 700)
    for hertz, rate in ((440.0, 16_000), (2000.0, 22_050), (6000.0, 44_100)):
        levels = log_mel(np.sin(2 * np.pi * hertz * np.arange(rate // 2) / rate), rate)
        assert levels.shape == (26, MELS)
        place = (2595 * np.log10(1 + hertz / 700) - bounds[0]) / (bounds[1] - bounds[0]) * (MELS + 1) - 1
        assert abs(levels[10].argmax() - place) <= 1, hertz
        assert levels.max() == 0
    assert (log_mel(np.zeros(1000), 16_000) == -40).all(), "silence is quiet"


def test_sounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("soundfile")
    (tmp_path / "a.wav").write_bytes(tone(440))
    (tmp_path / "b.wav").write_bytes(b"RIFF")
    rows = [
        {"audio": "a.wav", "caption": "a tone"},
        {"audio": "b.wav", "caption": "b"},
        {"audio": "c.wav", "text": "c"},
    ]
    data = FolderDataset(table(tmp_path, rows, 0), max_broken=1.0)
    (sample,) = data.read(range(3))
    audio = sample.values["audio"]
    assert audio.dtype == np.float32
    assert audio.shape == (26, MELS)
    assert audio.max() == 1
    assert audio.min() == -1
    (tmp_path / "a.wav").unlink()
    assert data[0].values["audio"] is audio, "it is decoded once"
    assert "FileNotFoundError" in data.broken.reasons["rows.jsonl: line 3"]
    assert set(data.broken.reasons) == {"rows.jsonl: line 2", "rows.jsonl: line 3"}
    with pytest.raises(BrokenImageError, match="expected at most 120 seconds of sound, got 130"):
        decode_audio(tone(440, 130, 1000))
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    with pytest.raises(ValueError, match=r"audio: needs the package soundfile: pip install 'mmkernels\[audio\]'"):
        FolderDataset(tmp_path)


def test_clips(tmp_path: Path) -> None:
    (tmp_path / "a.webp").write_bytes(clip([10 * i for i in range(16)]))
    (tmp_path / "frames").mkdir()
    for i in range(3):
        (tmp_path / "frames" / f"{i}.png").write_bytes(png(100 * i))
    (tmp_path / "empty").mkdir()
    rows = [{"video": name, "action": "fade"} for name in ("a.webp", "frames", "empty", "gone.gif")]
    data = FolderDataset(table(tmp_path, rows, 0), labels=("action",), resolution=12, max_broken=1.0)
    animated, folder = (sample.values["video"] for sample in data.read(range(4)))
    assert animated.shape == folder.shape == (8, 12, 12, 3)
    assert animated[:, 6, 6, 0].tolist() == [10 + 20 * i for i in range(8)]
    assert (animated[:, 0] == 255).all(), "margins are white"
    assert folder[:, 6, 6, 0].tolist() == [0, 0, 0, 100, 100, 200, 200, 200]
    assert "expected a folder of images, got none in empty" in data.broken.reasons["rows.jsonl: line 3"]
    assert "FileNotFoundError" in data.broken.reasons["rows.jsonl: line 4"]
    (still,) = np.unique(decode_video(png(7), 4)[..., 0])
    assert still == 7


# ------------------------------------------------------------------------------------------------ regions and vectors


def test_regions_are_cut_from_the_image(tmp_path: Path) -> None:
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, 20:] = (0, 200, 0)
    Image.fromarray(image).save(tmp_path / "0.png")
    boxes = [{"box": [0.5, 0, 1, 1], "tag": "green"}, {"box": [0, 0.0, 0.25, 0.5], "tag": "black"}]
    data = FolderDataset(table(tmp_path, [{"image": "0.png", "regions": boxes}], 0), fields=("regions",))
    assert data.classes == {"tag": ("black", "green")}
    regions = data.read([0])[0].values["regions"]
    np.testing.assert_allclose(regions.boxes, [[0.5, 0.25, 1, 0.75], [0, 0.25, 0.25, 0.5]])
    assert (regions.crops[0] == (0, 200, 0)).all()
    assert (regions.crops[1] == 0).all()
    assert regions.tags.tolist() == [1, 0]
    assert len(data.peek(0)["regions"].tags) == 2


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("regions", [{"box": [0, 0, 2, 1]}], "regions: expected a list of"),
        ("regions", "[{", "regions: expected a list of"),
        ("vector", [1, "x"], "vector: expected numbers, or lists of equally many"),
        ("vector", [[1, 2], [3]], "vector: expected numbers, or lists of equally many"),
        ("answer", ["a", "b"], "answer: expected one class, got"),
        ("question", [1], "question: expected text or a list of texts, got"),
        ("audio", 3, "audio: expected a path, got 3"),
    ],
)
def test_a_wrong_value_is_counted_and_named(field: str, value: Any, message: str, tmp_path: Path) -> None:
    good = {"regions": [], "vector": [1.0], "answer": "a", "question": "b", "audio": "c.wav"}[field]
    rows = [{"image": "0.png", field: good}, {"image": "1.png", field: value}]
    labels = ("answer",) if field == "answer" else ()
    data = FolderDataset(table(tmp_path, rows), fields=("image", field), labels=labels, max_broken=0.5)
    ((place, why),) = data.broken.reasons.items()
    assert place == "rows.jsonl: line 2"
    assert message in why


def test_vectors(tmp_path: Path) -> None:
    rows = [{"text": "a", "vector": [1, 2.5]}, {"text": "b", "vector": "[[1, 2], [3, 4]]"}]
    first, second = FolderDataset(table(tmp_path, rows, 0), fields=("text", "vector")).read(range(2))
    assert first.values["vector"].dtype == np.float32
    assert first.values["vector"].tolist() == [1, 2.5]
    assert second.values["vector"].shape == (2, 2)


# ------------------------------------------------------------------------------------------------ shards


def test_shards_with_other_fields(tmp_path: Path) -> None:
    pytest.importorskip("soundfile")
    files = {
        "a.png": png(1),
        "a.json": json.dumps({"question": "which?", "answer": "x", "caption": "one"}).encode(),
        "b.wav": tone(440),
        "b.txt": b"a tone",
        "c.webp": clip([0, 80]),
        "c.json": b'{"answer": "y"}',
        "d.cls": b"1",
        "e.json": b"[",
    }
    fields = ("image", "text", "audio", "video", "question")
    data = WebDataset(shard(tmp_path / "s.tar", files), fields=fields, labels=("answer",), max_broken=0.5)
    found = {sample.name: sample.values for sample in data.read(range(len(data)))}
    assert {name: sorted(values) for name, values in found.items()} == {
        "s.tar/a": ["answer", "image", "question", "text"],
        "s.tar/b": ["audio", "text"],
        "s.tar/c": ["answer", "video"],
    }
    assert data.classes == {"answer": ("x", "y")}
    assert "unreadable text" in data.broken.reasons["s.tar/e"]
    assert data.broken.left_out == {"s.tar/d.cls": "of no field that is read"}
    with pytest.raises(ValueError, match=r"expected values in every field that is read, got none in 'topic'"):
        WebDataset(tmp_path, fields=("text", "topic"), max_broken=1.0)
