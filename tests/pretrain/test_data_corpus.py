"""The corpus is whole and clean, its passages are of the promised length, and no chapter is on both sides."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from importlib import resources

import numpy as np
import pytest

from mmkernels.pretrain.data.base import Text
from mmkernels.pretrain.data.corpus import CorpusSource, load_corpus, open_text

FOLDER = resources.files("mmkernels.pretrain.data") / "corpus"
CHAPTERS = {
    "Emma": 55,
    "Mansfield Park": 48,
    "Northanger Abbey": 31,
    "Persuasion": 24,
    "Pride and Prejudice": 61,
    "Sense and Sensibility": 50,
}


def test_pack_is_the_one_that_was_reviewed() -> None:
    data = (FOLDER / "corpus.npz").read_bytes()
    assert hashlib.sha256(data).hexdigest() == "a05d0c5322c266aab212b94358900b5369b28a21758bf65d52b4343a9ee1b5ef"
    assert len(data) < 1_000_000


def test_every_chapter_is_there() -> None:
    corpus = load_corpus()
    assert dict(Counter(name.partition("/")[0] for name in corpus.chapters)) == CHAPTERS
    assert [name for name in corpus.chapters if name.endswith("/1")] == [f"{title}/1" for title in corpus.books]
    assert list(corpus.books) == list(CHAPTERS)
    assert len(corpus.passages) == corpus.starts[-1] == 10_930
    assert np.diff(corpus.starts).min() >= 5
    assert sum(len(passage.split()) for passage in corpus.passages) == 716_773


def test_passages_are_short_clean_and_different() -> None:
    passages = load_corpus().passages
    lengths = np.array([len(passage) for passage in passages])
    assert lengths.max() <= 500
    assert (lengths >= 200).mean() > 0.95
    assert len(set(passages)) == len(passages)
    for passage in passages:
        assert passage == " ".join(passage.split()) != ""
        assert re.fullmatch(r"[A-Za-z0-9 !\"&'(),.:;?\[\]£-]+", passage), passage
    prose = " ".join(passages)
    for words in (
        "CHAPTER",
        "Gutenberg",
        "volume one",
        "Volume 1",
        "Volume II",
        "FINIS",
        "THE END",
        "Signet",
        "Rambler,",
    ):
        assert words not in prose, words


def test_sentences_are_not_cut_after_a_title() -> None:
    ends = Counter(passage.rpartition(" ")[2] for passage in load_corpus().passages)
    assert not {"Mr.", "Mrs.", "Dr.", "St."} & set(ends)
    assert sum(count for word, count in ends.items() if word[-1] in ".!?\"')") / ends.total() > 0.9


def test_known_passages() -> None:
    corpus = load_corpus()
    first = {title: corpus.passages[corpus.starts[corpus.chapters.index(f"{title}/1")]] for title in corpus.books}
    assert first["Pride and Prejudice"].startswith("It is a truth universally acknowledged, that a single man in")
    assert first["Emma"].startswith("Emma Woodhouse, handsome, clever, and rich, with a comfortable home")
    assert first["Persuasion"].startswith("Sir Walter Elliot, of Kellynch Hall, in Somersetshire, was a man who,")
    assert corpus.passages[-1].endswith("or producing coolness between their husbands.")
    assert corpus.books["Pride and Prejudice"] == 1813


def test_splits_share_no_chapter() -> None:
    corpus, data = load_corpus(), open_text()
    assert list(data.held_out) == ["held_out"]
    train, held_out = data.train, data.held_out["held_out"]
    assert len(train) + len(held_out) == len(corpus.passages)
    assert not set(train.concepts.tolist()) & set(held_out.concepts.tolist())
    chapters = [{split.name(i).rpartition("/")[0] for i in range(len(split))} for split in (train, held_out)]
    assert not chapters[0] & chapters[1]
    assert chapters[1] == {corpus.chapters[i] for i in corpus.held_out}
    assert len(chapters[1]) == 13
    assert {name.partition("/")[0] for name in chapters[1]} == set(CHAPTERS)
    followers = {train[i].values["next"].captions for i in range(len(train)) if "next" in train[i].values}
    assert not followers & {held_out[i].captions for i in range(len(held_out))}


def test_next_is_the_following_passage_of_the_chapter() -> None:
    corpus = load_corpus()
    source = CorpusSource(np.array([2, 0]))
    assert source.fields == ("text", "next", "book")
    length = int(corpus.starts[3] - corpus.starts[2])
    assert [source.name(i) for i in (0, length - 1, length)] == ["Emma/3/1", f"Emma/3/{length}", "Emma/1/1"]
    start = int(corpus.starts[2])
    assert source[0].values == {
        "text": Text((corpus.passages[start],)),
        "next": Text((corpus.passages[start + 1],)),
        "book": 0,
    }
    assert source[0].concept == source.concepts[0] == start
    lacking = [i for i in range(len(source)) if "next" not in source[i].values]
    assert lacking == [length - 1, len(source) - 1]
    last = CorpusSource(np.array([len(corpus.chapters) - 1]))
    assert last.classes["book"][last[0].values["book"]] == "Sense and Sensibility"


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="chapters: expected at least 0 and below 269, got -1"):
        CorpusSource(np.array([0, -1]))
    with pytest.raises(ValueError, match=r"chapters: expected each once, got \[4, 4\]"):
        CorpusSource(np.array([4, 4]))
    assert len(CorpusSource(np.zeros(0, np.int64))) == 0


def test_licence_travels_with_the_pack() -> None:
    attribution = (FOLDER / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert "public domain" in attribution
    assert "Modified" in attribution
    assert "Julia Silge" in (FOLDER / "LICENSES" / "MIT-janeaustenr.txt").read_text(encoding="utf-8")
