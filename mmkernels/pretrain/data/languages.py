"""The emoji's names in sixteen languages and ten scripts: text-text pairs that mean the same.

```python
data = open_languages()
data.train[0].values              # {"text": Text(("keycap: #",)), "text_b": Text(("Taste: #",)), "language": 0}
data.held_out["ja"]               # the concepts never seen in training, in Japanese
```

A sample is a concept in one language, so every pair is there once and an index determines all of it. The held-out
concepts are the emoji pack's, whole families of names: training has their names in no language.
`scripts/build_languages.py` builds the pack; its source and licence are in `languages/ATTRIBUTION.md`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import NamedTuple

import numpy as np

from mmkernels.pretrain.data.base import BrokenLog, Data, Sample, Source, Text
from mmkernels.pretrain.data.emoji import load_pack

__all__ = ["LanguagePack", "LanguageSource", "load_languages", "open_languages"]


class LanguagePack(NamedTuple):
    """The names by language code; concept `i` of the emoji pack is `names[code][i]`, None where CLDR has no name."""

    titles: dict[str, str]  # the languages' English names
    names: dict[str, tuple[str | None, ...]]


@cache
def load_languages() -> LanguagePack:
    """Read the embedded names (2 MB in memory, kept)."""
    path = resources.files(__package__) / "languages" / "languages.npz"
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        table = json.loads(arrays["table"].tobytes())
    return LanguagePack(table["titles"], {code: tuple(names) for code, names in table["names"].items()})


class LanguageSource(Source):
    """Names of emoji in English and in another language.

    Fields: `text`, the English name; `text_b`, the name in the other language; `language`, which one that is.

    Args:
        languages: codes such as "de"; a sample for each concept in each of them, one language after the other.
        concepts: int64, concepts of the emoji pack. A language may lack a name (Hindi does for the trombone); that pair
            does not exist.

    Raises:
        ValueError: an unknown or repeated language; a concept outside the pack.
    """

    fields = ("text", "text_b", "language")

    def __init__(self, languages: Sequence[str], concepts: np.ndarray) -> None:
        pack = load_languages()
        unknown = [code for code in languages if code not in pack.names]
        if unknown or len(set(languages)) != len(languages):
            raise ValueError(f"languages: expected different ones of {sorted(pack.names)}, got {list(languages)}")
        self._english = load_pack().names
        concepts = np.asarray(concepts, np.int64)
        outside = concepts[(concepts < 0) | (concepts >= len(self._english))]
        if len(outside):
            raise ValueError(f"concepts: expected at least 0 and below {len(self._english)}, got {outside[0]}")
        self.classes = {"language": tuple(pack.names)}  # all, so that labels mean the same in every split
        self._items = [
            (code, concept, name)
            for code in languages
            for concept in concepts.tolist()
            if (name := pack.names[code][concept]) is not None
        ]
        self.concepts = np.array([concept for _, concept, _ in self._items], np.int64)
        self.broken = BrokenLog(len(self._items), 0.0)

    def __getitem__(self, index: int) -> Sample:
        code, concept, name = self._items[index]
        values = {
            "text": Text((self._english[concept],)),
            "text_b": Text((name,)),
            "language": self.classes["language"].index(code),
        }
        return Sample(values, concept, self.name(index))

    def name(self, index: int) -> str:
        code, concept, _ = self._items[index]
        return f"{code}/{self._english[concept]}"


def open_languages() -> Data:
    """Training pairs of all languages, and the held-out concepts in each language, split by its code."""
    emoji, codes = load_pack(), tuple(load_languages().names)
    seen = np.setdiff1d(np.arange(len(emoji.names)), emoji.held_out)
    held_out: dict[str, Source] = {code: LanguageSource([code], emoji.held_out) for code in codes}
    return Data(LanguageSource(codes, seen), held_out)
