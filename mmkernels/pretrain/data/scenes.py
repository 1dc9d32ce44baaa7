"""Scenes: two to five emoji on a canvas, with captions, regions, questions, relations and documents.

Nothing is stored: a scene is a function of (seed, number), and every split has numbers of its own.

| split | drawings | concepts |
|---|---|---|
| train | every vendor's but the held-out one's | no pair of `held_out_pairs` |
| held_out | as in training | as in training; scenes with other numbers |
| combinations | as in training | one pair that never shares a training scene |
| drawings | the held-out vendor's | as in training |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from mmkernels.pretrain.data.base import Data, Document, Regions, Sample, Text
from mmkernels.pretrain.data.generated import END, MOST, SPLITS, Computed, GeneratedSource
from mmkernels.pretrain.data.scene_layout import RELATIONS, Group, Scene, concept_ids, draw_groups, lay_out
from mmkernels.pretrain.data.scene_picture import Look, look_of, picture, regions_of
from mmkernels.pretrain.data.scene_text import ANSWERS, CAPTION_FORMS, KINDS, Asked, ask, captions, related
from mmkernels.pretrain.data.seeds import Purpose, SampleDraws
from mmkernels.pretrain.data.tiles import load_tiles
from mmkernels.pretrain.data.vocabulary import WORDS

FIELDS = (
    *("image", "text", "regions", "tags", "question", "answer", "kind"),
    *("pair", "relation", "document", "group"),
)
_FURTHER = 3  # most scenes of a training document besides its first

_ANSWER = {answer: i for i, answer in enumerate(ANSWERS)}
_KIND = {kind: i for i, kind in enumerate(KINDS)}
_RELATION = {relation: i for i, relation in enumerate(RELATIONS)}


def open_scenes(
    *,
    fields: Sequence[str] = FIELDS,
    size: int = 100_000,
    held_out_size: int = 2_000,
    seed: int = 0,
    resolution: int = 48,
) -> Data:
    """Scenes to train on, and the held-out splits.

    Args:
        fields, seed, resolution: as in `SceneSource`.
        size: scenes to train on.
        held_out_size: scenes of each held-out split.
    """
    train, *held_out = (
        SceneSource(
            split,
            fields=fields,
            size=size if split == "train" else held_out_size,
            seed=seed,
            resolution=resolution,
        )
        for split in SPLITS
    )
    return Data(train, dict(zip(SPLITS[1:], held_out, strict=True)))


class SceneSource(GeneratedSource):
    """The scenes of a split.

    | field | value |
    |---|---|
    | image | uint8 [resolution, resolution, 3] |
    | text | `Text`: five captions, the first with colours and a relation |
    | regions | `Regions`: every object, with crops uint8 [n, 12, 12, 3] |
    | tags | `Text`: the words of the regions, in their order |
    | question, answer, kind | `Text`, and labels |
    | pair, relation | `Regions` of two objects, and the label of what the first is to the second |
    | document | `Document`: 2 to 4 scenes, 5 if held out, each with a caption; the captions have the same form |
    | group | label: the vendor who drew the scene |

    Args:
        split: one of SPLITS.
        fields: which of FIELDS the samples have; only these are computed.
        size: number of scenes, up to 2**40. A larger set begins with the scenes of a smaller one.
        seed: 0 <= seed < 2**64.
        resolution: side of the image in pixels, 16 to 512.
    """

    kind = "scenes"

    def __init__(
        self,
        split: str,
        *,
        fields: Sequence[str] = FIELDS,
        size: int = 100_000,
        seed: int = 0,
        resolution: int = 48,
    ) -> None:
        super().__init__(split, fields, FIELDS, size, seed)
        if not 16 <= resolution <= 512:
            raise ValueError(f"resolution: expected 16 to 512 pixels, got {resolution}")
        self.resolution = resolution
        vendors = load_tiles().vendors
        self.classes = {"tag": WORDS, "answer": ANSWERS, "kind": KINDS, "relation": RELATIONS, "group": vendors}
        self._words, self._counts = self._draw(self.numbers)
        self.concepts = concept_ids(self._words)

    def __getitem__(self, index: int) -> Sample:
        drawn = self.drawn(index)
        return Sample(Computed(drawn, self.fields), int(self.concepts[index]), drawn.name)

    def peek(self, index: int) -> Mapping[str, Any]:
        return Computed(Undrawn(self.drawn(index)), self.fields)

    def drawn(self, index: int) -> DrawnScene:
        """Scene `index` with all its fields, also those that the samples do not have."""
        return DrawnScene(self, index, self.number(index), self._words[index], self._counts[index])

    def further(self, index: int) -> Iterator[DrawnScene]:
        """The other scenes of the document of scene `index`, which are nowhere else: 3, and one more if held out."""
        first = self.first + MOST + _FURTHER * index
        last = [] if self.split == "train" else [END + SPLITS.index(self.split) * MOST + index]
        numbers = np.array([*range(first, first + _FURTHER), *last], np.int64)
        for number, words, counts in zip(numbers.tolist(), *self._draw(numbers), strict=True):
            yield DrawnScene(self, index, number, words, counts)

    def _draw(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return draw_groups(self.seed, numbers, new_pair=self.split == "combinations")

    def look(self, number: int) -> Look:
        return look_of(self.seed, number, self.vendors)


class DrawnScene:
    """One scene; its fields are computed when they are first read."""

    def __init__(self, source: SceneSource, index: int, number: int, words: np.ndarray, counts: np.ndarray) -> None:
        self._source, self._index, self._number = source, index, number
        self._groups: list[Group] = [(w, n) for w, n in zip(words.tolist(), counts.tolist(), strict=True) if n]
        self.name = source.name(index)

    @cached_property
    def scene(self) -> Scene:
        """What is where."""
        return lay_out(self._source.seed, self._number, self._groups)

    @cached_property
    def look(self) -> Look:
        return self._source.look(self._number)

    @cached_property
    def image(self) -> np.ndarray:
        return picture(self.scene, self.look, self._source.resolution)

    @cached_property
    def text(self) -> Text:
        return Text(captions(self.scene, self._colours))

    @property
    def regions(self) -> Regions:
        return regions_of(self.scene, range(len(self.scene.words)), self.image)

    @property
    def tags(self) -> Text:
        return Text((" ".join(WORDS[word] for word in self.scene.words),))

    @property
    def question(self) -> Text:
        return Text(self._asked.questions)

    @property
    def answer(self) -> int:
        return _ANSWER[self._asked.answer]

    @property
    def kind(self) -> int:
        return _KIND[self._asked.kind]

    @property
    def pair(self) -> Regions:
        return regions_of(self.scene, self._related[:2], self.image)

    @property
    def relation(self) -> int:
        return _RELATION[self._related[2]]

    @cached_property
    def document(self) -> Document:
        return self.written(lambda scene: scene.image)

    def written(self, picture: Callable[[DrawnScene], Any]) -> Document:
        """The document, with this in the place of each picture."""
        draws = SampleDraws(self._source.seed, Purpose.DOCUMENT, self._number)
        form, more = draws.below(CAPTION_FORMS), draws.between(1, _FURTHER)
        scenes = [self, *self._source.further(self._index)]
        if self._source.split == "train":  # held-out documents are as long as it takes to ask after several examples
            scenes = scenes[: 1 + more]
        return Document(tuple(part for scene in scenes for part in (picture(scene), scene.text.captions[form])))

    @property
    def group(self) -> int:
        return self.look.vendor

    @property
    def _colours(self) -> list[str]:
        return load_tiles().colours[self.look.vendor]

    @cached_property
    def _asked(self) -> Asked:
        return ask(self.scene, self._colours, SampleDraws(self._source.seed, Purpose.QUESTION, self._number))

    @cached_property
    def _related(self) -> tuple[int, int, str]:
        return related(self.scene, SampleDraws(self._source.seed, Purpose.PAIR, self._number))


class Undrawn:
    """A scene whose pictures are not drawn: `...` stands for them."""

    image = ...

    def __init__(self, drawn: DrawnScene) -> None:
        self._drawn = drawn

    @property
    def document(self) -> Document:
        return self._drawn.written(lambda scene: ...)

    def __getattr__(self, field: str) -> Any:
        return getattr(self._drawn, field)
