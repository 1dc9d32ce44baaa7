"""The names are complete, each in its language's script, and the splits share no concept."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from importlib import resources

import numpy as np
import pytest

from mmkernels.pretrain.data.base import Text
from mmkernels.pretrain.data.emoji import load_pack
from mmkernels.pretrain.data.languages import LanguageSource, load_languages, open_languages

FOLDER = resources.files("mmkernels.pretrain.data") / "languages"
# The first words of the Unicode names of a script's letters.
SCRIPTS = {
    "de": {"LATIN"},
    "fr": {"LATIN"},
    "es": {"LATIN"},
    "it": {"LATIN"},
    "pt": {"LATIN"},
    "tr": {"LATIN"},
    "ru": {"CYRILLIC"},
    "uk": {"CYRILLIC", "MODIFIER"},  # U+02BC, the apostrophe
    "el": {"GREEK"},
    "ar": {"ARABIC"},
    "he": {"HEBREW"},
    "hi": {"DEVANAGARI"},
    "th": {"THAI"},
    "ja": {"CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"},
    "ko": {"HANGUL"},
    "zh": {"CJK"},
}
IN_LATIN = {"atm", "cd", "dna", "dvd", "email", "joystick", "md", "ok", "selfie", "wc", "wi-fi"}  # names as a whole


def test_pack_is_the_one_that_was_reviewed() -> None:
    data = (FOLDER / "languages.npz").read_bytes()
    assert hashlib.sha256(data).hexdigest() == "7bf603b1ed1870de32643e0280ca232a5d903e26ce0a683481e7a7f03c40c07e"
    assert len(data) < 300_000


def test_every_concept_has_a_name_of_its_own_in_every_language() -> None:
    pack = load_languages()
    assert set(pack.names) == set(pack.titles) == set(SCRIPTS)
    for code, names in pack.names.items():
        missing = [english for english, name in zip(load_pack().names, names, strict=True) if name is None]
        assert missing == (["trombone"] if code == "hi" else [])
        present = [name for name in names if name is not None]
        assert len(set(present)) == len(present), code
        assert all(name == unicodedata.normalize("NFC", name).strip() != "" for name in present), code


@pytest.mark.parametrize("code", list(SCRIPTS))
def test_names_are_in_the_script_of_their_language(code: str) -> None:
    for name in filter(None, load_languages().names[code]):
        scripts = {unicodedata.name(char).split()[0] for char in name if char.isalpha()}
        assert scripts <= SCRIPTS[code] | {"LATIN"}, name  # abbreviations such as ATM
        assert scripts & SCRIPTS[code] or name.casefold() in IN_LATIN, name


@pytest.mark.parametrize("code", ["ru", "uk", "el", "ar", "he", "hi", "th", "ko"])
def test_no_word_mixes_scripts(code: str) -> None:
    """A Latin `c` in a Cyrillic word looks right and is another letter."""
    for name in filter(None, load_languages().names[code]):
        for word in re.findall(r"\w+", name):
            scripts = {unicodedata.name(char).split()[0] for char in word if char.isalpha()}
            assert scripts <= SCRIPTS[code] or scripts == {"LATIN"}, name


def test_known_names() -> None:
    banana = load_pack().names.index("banana")
    names = load_languages().names
    assert [names[code][banana] for code in ("de", "ru", "he", "ja", "ko", "zh")] == [
        "Banane",
        "банан",
        "בננה",
        "バナナ",
        "바나나",
        "香蕉",
    ]
    judge = load_pack().names.index("woman judge")  # a sequence, whose name CLDR derives
    assert names["de"][judge] == "Richterin"
    keycap = load_pack().names.index("keycap: 7")
    assert names["fr"][keycap] == "touches\u202f: 7"


def test_splits_share_no_concept_and_no_name() -> None:
    data = open_languages()
    held_out = set(load_pack().held_out.tolist())
    assert tuple(data.held_out) == data.train.classes["language"]
    assert set(data.train.concepts.tolist()) == set(range(len(load_pack().names))) - held_out
    assert len(data.train) == 16 * (len(load_pack().names) - len(held_out)) - 1  # but for Hindi's trombone
    values = [data.train[i].values for i in range(len(data.train))]
    seen = {(value["language"], value["text_b"]) for value in values}
    for code, split in data.held_out.items():
        assert set(split.concepts.tolist()) == held_out
        values = [split[i].values for i in range(len(split))]
        assert {value["language"] for value in values} == {split.classes["language"].index(code)}
        assert not seen & {(value["language"], value["text_b"]) for value in values}


def test_sample_is_what_the_pack_holds() -> None:
    train = open_languages().train
    assert train.fields == ("text", "text_b", "language")
    for index in (0, 9999, len(train) - 1):
        sample = train[index]
        code, _, english = sample.name.partition("/")
        assert sample.concept == train.concepts[index] == load_pack().names.index(english)
        assert sample.values == {
            "text": Text((english,)),
            "text_b": Text((load_languages().names[code][sample.concept],)),  # type: ignore[arg-type]
            "language": train.classes["language"].index(code),
        }
        assert train.name(index) == sample.name


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"languages: expected different ones of .*'ar'.*, got \['de', 'xx'\]"):
        LanguageSource(["de", "xx"], np.arange(3))
    with pytest.raises(ValueError, match=r"languages: expected different ones of .*, got \['de', 'de'\]"):
        LanguageSource(["de", "de"], np.arange(3))
    with pytest.raises(ValueError, match="concepts: expected at least 0 and below 1644, got 1644"):
        LanguageSource(["de"], np.array([3, 1644]))
    assert len(LanguageSource([], np.arange(3))) == len(LanguageSource(["de"], np.arange(0))) == 0


def test_licence_travels_with_the_pack() -> None:
    attribution = (FOLDER / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert "Unicode CLDR" in attribution
    assert "Modified" in attribution
    assert (FOLDER / "LICENSES" / "Unicode-3.0.txt").read_text(encoding="utf-8").startswith("UNICODE LICENSE V3")
