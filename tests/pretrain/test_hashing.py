"""Words and trigrams, hashed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mmkernels.pretrain.hashing import split_words, trigrams, word_hashes


def test_rows_are_the_same_in_every_process_and_for_ever() -> None:
    found = word_hashes("red apple", 4096, 8192, 16)
    assert found == [(1696, (653, 4825, 4441)), (999, (1308, 7285, 2647, 6486, 1141))]
    code = "from mmkernels.pretrain.hashing import word_hashes as h; print(h('red apple', 4096, 8192, 16))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str(found)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A Red-Hot chili, o'clock!", ["a", "red", "hot", "chili", "oclock", "!"]),
        ("keycap: #", ["keycap", "#"]),
        ("Straße ＦＵＬＬ", ["strasse", "full"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),  # vowel signs belong to the word
        ("我爱🍌", ["我爱", "🍌"]),
        ("e\u0301te\u0301", ["été"]),
        ("  \t\n", []),
        ("...", []),
    ],
)
def test_words_in_any_script(text: str, words: list[str]) -> None:
    assert [word for chunk in text.split() for word in split_words(chunk)] == words


def test_trigrams() -> None:
    assert trigrams("cat") == ["<ca", "cat", "at>"]
    assert trigrams("a") == ["<a>"]


def test_blank_and_long_texts() -> None:
    assert word_hashes("", 4096, 8192, 3) == word_hashes("...", 4096, 8192, 3) == [(0, (0,))]
    assert word_hashes("one two three four", 4096, 8192, 3) == word_hashes("one two three", 4096, 8192, 9)


def test_rows_fit_the_tables() -> None:
    found = [row for i in range(100) for row in word_hashes(f"word{i}", 5, 7, 4)]
    assert {word for word, _ in found} == {1, 2, 3, 4}
    assert {gram for _, grams in found for gram in grams} == {1, 2, 3, 4, 5, 6}
