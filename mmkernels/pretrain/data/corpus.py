"""The embedded corpus: Jane Austen's six novels as passages of a few sentences, at most 500 characters.

```python
data = open_text()
data.train[0].values        # {"text": Text(("Emma Woodhouse, ...",)), "next": Text(("Her mother ...",)), "book": 0}
data.held_out["held_out"]   # 13 of the 269 chapters
```

Whole chapters are held out, so neither a passage nor the one that follows it is on both sides.
`scripts/build_corpus.py` builds the pack; its source and licence are in `corpus/ATTRIBUTION.md`.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

import numpy as np

from mmkernels.pretrain.data.base import BrokenLog, Data, Sample, Source, Text

__all__ = ["Corpus", "CorpusSource", "load_corpus", "open_text"]


class Corpus(NamedTuple):
    """The novels; chapter `i` has the passages `starts[i]` to `starts[i + 1]`."""

    passages: tuple[str, ...]  # in reading order
    starts: np.ndarray  # int64 [chapters + 1]
    chapters: tuple[str, ...]  # as "Emma/13", numbered through a book's volumes
    books: dict[str, int]  # the year of publication by title
    held_out: np.ndarray  # int64: chapters kept out of training


@cache
def load_corpus() -> Corpus:
    """Read the embedded corpus (5 MB in memory, kept)."""
    path = resources.files(__package__) / "corpus" / "corpus.npz"
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        table = json.loads(arrays["table"].tobytes())
        passages = tuple(arrays["text"].tobytes().decode("utf-8").split("\n"))
    starts = np.concatenate([[0], np.cumsum(table["passages"])]).astype(np.int64)
    held_out = np.array(table["held_out"], np.int64)
    return Corpus(passages, starts, tuple(table["chapters"]), table["books"], held_out)


class CorpusSource(Source):
    """The passages of some chapters, in reading order.

    Fields: `text`, the passage; `next`, the one that follows it in its chapter, which a chapter's last one lacks;
    `book`, the novel. Every passage is a concept of its own.

    Args:
        chapters: int64, chapters of the corpus.

    Raises:
        ValueError: a chapter that the corpus does not have, or one given twice.
    """

    fields = ("text", "next", "book")

    def __init__(self, chapters: np.ndarray) -> None:
        self._corpus = corpus = load_corpus()
        chapters = np.asarray(chapters, np.int64)
        outside = chapters[(chapters < 0) | (chapters >= len(corpus.chapters))]
        if len(outside):
            raise ValueError(f"chapters: expected at least 0 and below {len(corpus.chapters)}, got {outside[0]}")
        if len(np.unique(chapters)) != len(chapters):
            raise ValueError(f"chapters: expected each once, got {chapters.tolist()}")
        self.classes = {"book": tuple(corpus.books)}
        spans = [np.arange(corpus.starts[i], corpus.starts[i + 1]) for i in chapters.tolist()]
        self.concepts = np.concatenate(spans) if spans else np.zeros(0, np.int64)
        self._chapters = np.repeat(chapters, [len(span) for span in spans])
        self.broken = BrokenLog(len(self.concepts), 0.0)

    def __getitem__(self, index: int) -> Sample:
        passage, chapter = int(self.concepts[index]), int(self._chapters[index])
        title = self._corpus.chapters[chapter].partition("/")[0]
        values: dict[str, Any] = {"text": Text((self._corpus.passages[passage],))}
        if passage + 1 < self._corpus.starts[chapter + 1]:
            values["next"] = Text((self._corpus.passages[passage + 1],))
        values["book"] = self.classes["book"].index(title)
        return Sample(values, passage, self.name(index))

    def name(self, index: int) -> str:
        chapter = int(self._chapters[index])
        place = int(self.concepts[index]) - int(self._corpus.starts[chapter]) + 1
        return f"{self._corpus.chapters[chapter]}/{place}"


def open_text() -> Data:
    """Training passages, and those of the held-out chapters, split "held_out"."""
    corpus = load_corpus()
    seen = np.setdiff1d(np.arange(len(corpus.chapters)), corpus.held_out)
    return Data(CorpusSource(seen), {"held_out": CorpusSource(corpus.held_out)})
