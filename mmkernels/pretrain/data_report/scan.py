"""One pass over the data: hashes, lengths and flags of every sample; no sample is kept."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from mmkernels.pretrain.data import BrokenImageError, Document, Mixed, Regions, Source, Text
from mmkernels.pretrain.data.captions import says_empty
from mmkernels.pretrain.data.filter_list import TRAIN
from mmkernels.pretrain.data_report.kinds import Finding
from mmkernels.pretrain.data_report.pictures import Print, fingerprint
from mmkernels.pretrain.data_report.reading import Opened
from mmkernels.pretrain.data_report.texts import boilerplate, normalised, script_of
from mmkernels.pretrain.tokenizer import TextTokenizer

__all__ = ["NONE", "Rows", "Scan", "Weigh", "captions_of", "is_picture", "scan", "text_key"]

NONE = -1
Weigh = Callable[[Mapping[str, Any]], int]  # the values of a sample -> its tokens
_LETTERS = 4  # of a text whose script is judged


class Rows(NamedTuple):
    """A row per sample that could be read, split after split: int64 [n] each.

    `picture`, `media`, `text`, `labels` and `caption` are numbers of contents, the same where these are: the picture's
    pixels, all other media, all normalised texts, all labels, the first caption; NONE where a sample has none.
    """

    split: Any  # number of its split
    index: Any  # in its split
    picture: Any
    media: Any
    text: Any
    labels: Any
    caption: Any
    hash: Any  # perceptual, the bits of a uint64
    plain: Any  # a picture with too little in it for that hash
    blank: Any  # a picture of one colour
    length: Any  # tokens


@dataclass
class Scan:
    """What a pass leaves.

    Attributes:
        splits: their names.
        rows: of the samples.
        counts: (split, field) -> samples that have it.
        measures: (split, what) -> one value per picture, text, ...
        classes: (split, label) -> samples (of tags: regions) of each class; -100 for none.
        scripts: field -> script -> rows of the texts that are long enough to tell.
        findings: what single samples show.
    """

    splits: list[str]
    rows: Rows
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    measures: dict[tuple[str, str], Any] = field(default_factory=dict)
    classes: dict[tuple[str, str], Counter[int]] = field(default_factory=dict)
    scripts: dict[str, dict[str, Any]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def of(self, split: str) -> np.ndarray:
        """The rows of a split."""
        return np.flatnonzero(self.rows.split == self.splits.index(split))


def scan(data: Opened, tokenizer: TextTokenizer, weigh: Weigh, max_tokens: int) -> Scan:
    """Read every sample once.

    Args:
        data: opened.
        tokenizer: counts the tokens of texts.
        weigh: counts those of a sample.
        max_tokens: of a text, two for its ends included; more are too long.
    """
    reader = _Reader(tokenizer, max_tokens)
    flat = array("q")
    total = sum(map(len, data.read.values()))
    with tqdm(total=total, unit="sample", desc="reading", dynamic_ncols=True, disable=None, leave=False) as bar:
        for number, (split, source) in enumerate(data.splits.items()):
            reader.begin(split, source)
            for index in data.read[split].tolist():
                bar.update()
                try:
                    values = source[index].values
                except BrokenImageError as error:
                    reader.find(_fault(str(error)), index, str(error), readable=False)
                    continue
                row = reader.row(values, len(flat) // len(Rows._fields), index)
                flat.extend((number, index, *row, weigh(values)))
    columns = np.array(flat, np.int64).reshape(-1, len(Rows._fields)).T
    found = Scan(list(data.splits), Rows(*columns), reader.counts, reader.measures, reader.classes, reader.scripts)
    found.findings = [*_lost(data), *reader.findings]
    return found


def _lost(data: Opened) -> Iterator[Finding]:
    """Rows that are no sample, because they lack what every sample must have."""
    logs: dict[int, _Log] = {}
    parts = data.train.parts if isinstance(data.train, Mixed) else {"": data.train}
    for part, source in parts.items():
        logs.setdefault(id(source.broken), _Log(TRAIN, f"{part}: " if part else "", [])).sources.append(source)
    for split, source in data.splits.items():
        if split != TRAIN:
            logs.setdefault(id(source.broken), _Log(split, "", [])).sources.append(source)
    for log in logs.values():
        reasons = log.sources[0].broken.reasons
        samples = {each.logged_as(i) for each in log.sources for i in range(len(each))} if reasons else set()
        for name, why in reasons.items():
            if name not in samples:
                yield Finding(_fault(why), log.split, None, log.prefix + name, why, readable=False)


def _fault(why: str) -> str:
    """The kind of what cannot be read."""
    return "empty" if says_empty(why) else "broken"


class _Log(NamedTuple):
    """The sources that share a record of what is broken."""

    split: str
    prefix: str  # of names, in a mixture
    sources: list[Source]


class _Reader:
    """Turns samples into rows, and gathers the rest."""

    def __init__(self, tokenizer: TextTokenizer, max_tokens: int) -> None:
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.counts: Counter[tuple[str, str]] = Counter()
        self.measures: dict[tuple[str, str], Any] = {}
        self.classes: dict[tuple[str, str], Counter[int]] = {}
        self.scripts: dict[str, dict[str, Any]] = {}
        self.findings: list[Finding] = []
        self._numbers: dict[Any, int] = {}

    def begin(self, split: str, source: Source) -> None:
        self.split, self.source = split, source

    def find(self, kind: str, index: int, why: str, *, readable: bool = True) -> None:
        self.findings.append(Finding(kind, self.split, index, self.source.logged_as(index), why, readable=readable))

    def row(self, values: Mapping[str, Any], row: int, index: int) -> tuple[int, ...]:
        """All of a sample's row but its place and its length."""
        picture: Print | None = None
        media: list[bytes] = []
        labels: list[tuple[str, int]] = []
        for name, value in values.items():
            if value is None:
                continue
            self.counts[self.split, name] += 1
            if isinstance(value, str | Text):
                self._text(name, captions_of(value), row, index)
            elif isinstance(value, Regions):
                self._measure(f"{name}: regions", len(value.boxes))
                self._count("tag", value.tags.tolist())
            elif isinstance(value, Document):
                self._measure(f"{name}: parts", len(value.parts))
                media += [_digest(name, part) for part in value.parts if not isinstance(part, str)]
            elif isinstance(value, np.ndarray) and picture is None and is_picture(value):
                picture = self._picture(name, value, index)
            elif isinstance(value, np.ndarray):
                self._measure(f"{name}: {_unit(name, value)}", len(value))
                media.append(_digest(name, value))
            elif name in self.source.classes:
                labels.append((name, int(value)))
                self._count(name, [int(value)])
        if picture is not None and picture.blank:
            self.find("blank", index, "one colour")
        text = text_key(values)
        first = captions_of(values["text"])[0] if values.get("text") else ""
        return (
            self._number("picture", None if picture is None else picture.digest),
            self._number("media", b"".join(media) or None),
            self._number("text", text or None),
            self._number("labels", tuple(sorted(labels)) or None),
            self._number("caption", _brief(normalised(first)) or None),
            0 if picture is None else int(np.array(picture.hash, np.uint64).astype(np.int64)),
            picture is None or picture.plain,
            picture is not None and picture.blank,
        )

    def _number(self, kind: str, content: Any) -> int:
        return NONE if content is None else self._numbers.setdefault((kind, content), len(self._numbers))

    def _measure(self, what: str, value: float) -> None:
        self.measures.setdefault((self.split, what), array("d")).append(value)

    def _count(self, label: str, classes: list[int]) -> None:
        self.classes.setdefault((self.split, label), Counter()).update(classes)

    def _picture(self, name: str, value: np.ndarray, index: int) -> Print:
        size = self.source.stored_size(index) if name == "image" else (value.shape[1], value.shape[0])
        width, height = size or (value.shape[1], value.shape[0])
        self._measure(f"{name}: width in pixels", width)
        self._measure(f"{name}: height in pixels", height)
        self._measure(f"{name}: width / height", width / height)
        return fingerprint(value)

    def _text(self, name: str, captions: tuple[str, ...], row: int, index: int) -> None:
        tokens = [len(self.tokenizer.encode(caption)) for caption in captions]
        for caption, count in zip(captions, tokens, strict=True):
            self._measure(f"{name}: characters", len(caption))
            self._measure(f"{name}: words", len(caption.split()))
            self._measure(f"{name}: tokens", count)
        where = "" if name == "text" else f"{name}: "
        if not any(map(normalised, captions)):
            self.find("empty", index, f"{where}{captions[0]!r}")
        elif all(found := [boilerplate(caption) for caption in captions]):
            self.find("boilerplate", index, f"{where}{found[0]}: {captions[0][:200]}")
        if min(tokens) + 2 > self.max_tokens:
            self.find("long", index, f"{where}{min(tokens) + 2:,} tokens, at most {self.max_tokens:,} are read")
        scripts = {script_of(caption, _LETTERS) for caption in captions}
        if len(scripts) == 1 and (script := scripts.pop()):
            self.scripts.setdefault(name, {}).setdefault(script, array("q")).append(row)


def captions_of(value: Any) -> tuple[str, ...]:
    """The texts of a field."""
    return (value,) if isinstance(value, str) else tuple(value.captions) or ("",)


def is_picture(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3 and value.shape[2] in (3, 4)


def text_key(values: Mapping[str, Any]) -> bytes:
    """A hash of all texts of a sample in their normal form, in any order within a field; empty if there are none."""
    fields = []
    for name, value in values.items():
        if isinstance(value, str | Text):
            fields.append((name, *sorted(map(normalised, captions_of(value)))))
        elif isinstance(value, Document):
            fields.append((name, *(normalised(part) for part in value.parts if isinstance(part, str))))
    return _brief(repr(sorted(fields))) if fields else b""


def _brief(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() if text else b""


def _digest(name: str, value: np.ndarray) -> bytes:
    found = hashlib.blake2b(f"{name} {value.dtype} {value.shape}".encode(), digest_size=16)
    found.update(value.tobytes())
    return found.digest()


def _unit(name: str, value: np.ndarray) -> str:
    """What the length of an array is."""
    return "frames" if name in ("audio", "video") else "rows" if value.ndim > 1 else "numbers"
