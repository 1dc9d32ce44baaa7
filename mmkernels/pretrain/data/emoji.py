"""The embedded data set: emoji by five vendors, and three held-out sets that test different things.

| split | held out of training | queries -> gallery |
|---|---|---|
| A | a rendering: all of Twemoji | its drawings of the seen concepts -> the seen names |
| B | concepts: 12% of the families | the seen vendors' drawings of them -> their names |
| C | both | Twemoji's drawings of the held-out concepts -> their names |

A family is a name without man, woman and person, so that `woman judge` in training does not reveal a held-out `man
judge`; and a drawing that a vendor uses for a held-out concept, too, is not in training. The label `group` is Unicode's
(food & drink, travel & places, ...), the same for all drawings of a concept.
`scripts/build_emoji_pack.py` builds the pack; artists and licences are in `emoji/ATTRIBUTION.md`.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import cache
from importlib import resources
from typing import Literal, NamedTuple

import numpy as np

from mmkernels.pretrain.data.base import BrokenLog, Data, Sample, Source

HELD_OUT_VENDOR = "twemoji"
# Drawings of seen concepts that are also those of a held-out one, as `mmkernels data-report` finds them.
LEAKED = ("noto/family: man, man, boy, boy", "fluent-flat/grinning cat", "fluent-flat/black medium square")
Split = Literal["train", "A", "B", "C"]


class Drawings(NamedTuple):
    """The drawings of one vendor."""

    concepts: np.ndarray  # int64 [n]
    indices: np.ndarray  # uint8 [n, R, R], into the palette
    palette: np.ndarray  # uint8 [colours, 4], RGBA with straight alpha


class EmojiPack(NamedTuple):
    """The whole pack; concept `i` has `names[i]`, `keywords[i]`, `families[i]`, `groups[i]`, code points `codes[i]`."""

    names: list[str]
    keywords: list[tuple[str, ...]]
    families: list[str]
    groups: list[str]
    codes: list[str]
    held_out: np.ndarray  # int64: the concepts of splits B and C
    vendors: dict[str, Drawings]


@cache
def load_pack() -> EmojiPack:
    """Read the embedded pack (17 MB in memory, kept)."""
    path = resources.files(__package__) / "emoji" / "emoji.npz"
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        table = json.loads(arrays["table"].tobytes())
        vendors = {
            name: Drawings(
                arrays[f"{name}/concepts"].astype(np.int64), arrays[f"{name}/indices"], arrays[f"{name}/palette"]
            )
            for name in table["vendors"]
        }
    keywords = [tuple(words) for words in table["keywords"]]
    held_out = np.array(table["held_out"], np.int64)
    words = (table["names"], keywords, table["families"], table["groups"], table["codes"])
    return EmojiPack(*words, held_out, vendors)


class EmojiDataset(Source):
    """The given vendors' drawings of the given concepts.

    Args:
        vendors: names of vendors in the pack.
        concepts: int64, the requested concepts; a vendor may lack some.
        without: names of drawings to leave out.
    """

    def __init__(self, vendors: list[str], concepts: np.ndarray, without: Collection[str] = ()) -> None:
        self.pack = load_pack()
        unknown = set(vendors) - set(self.pack.vendors)
        if unknown:
            raise ValueError(f"vendors: expected some of {sorted(self.pack.vendors)}, got {sorted(unknown)}")
        self._items: list[tuple[str, int]] = []  # vendor, row in its drawings
        found: list[int] = []
        for vendor in vendors:
            own = self.pack.vendors[vendor].concepts
            for row in np.flatnonzero(np.isin(own, concepts)).tolist():
                if f"{vendor}/{self.pack.names[own[row]]}" not in without:
                    self._items.append((vendor, row))
                    found.append(int(own[row]))
        self.concepts = np.array(found, np.int64)
        self.fields, self.classes = ("image", "text", "group"), {"group": tuple(sorted(set(self.pack.groups)))}
        self.resolution = next(iter(self.pack.vendors.values())).indices.shape[1]
        self.broken = BrokenLog(len(self.concepts), 0.0)

    def __getitem__(self, index: int) -> Sample:
        vendor, row = self._items[index]
        drawings = self.pack.vendors[vendor]
        concept = int(self.concepts[index])
        words = drawings.palette.view(np.uint32)[:, 0]  # a colour as one word: gathers four times faster
        image = words[drawings.indices[row]].view(np.uint8).reshape(self.resolution, self.resolution, 4)
        captions, keywords = (self.pack.names[concept],), self.pack.keywords[concept]
        group = self.classes["group"].index(self.pack.groups[concept])
        return Sample.of_pair(image, captions, keywords, concept, self.name(index), group=group)

    def name(self, index: int) -> str:
        return f"{self._items[index][0]}/{self.pack.names[int(self.concepts[index])]}"


def load_emoji(split: Split = "train") -> EmojiDataset:
    """A split of the embedded data: the training set, or a held-out one (see the module)."""
    pack = load_pack()
    seen = np.setdiff1d(np.arange(len(pack.names)), pack.held_out)
    seen_vendors = [vendor for vendor in pack.vendors if vendor != HELD_OUT_VENDOR]
    parts = {
        "train": (seen_vendors, seen),
        "A": ([HELD_OUT_VENDOR], seen),
        "B": (seen_vendors, pack.held_out),
        "C": ([HELD_OUT_VENDOR], pack.held_out),
    }
    if split not in parts:
        raise ValueError(f"split: expected 'train', 'A', 'B' or 'C', got {split!r}")
    return EmojiDataset(*parts[split], without=LEAKED if split == "train" else ())


def open_emoji() -> Data:
    """The training set and the three held-out sets."""
    return Data(load_emoji(), {"A": load_emoji("A"), "B": load_emoji("B"), "C": load_emoji("C")})
