"""What can be said and asked about a scene; all of it is true."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations
from typing import NamedTuple

from mmkernels.pretrain.data.scene_layout import GRID, OPPOSITE, SIDES, Box, Group, Scene, relation_of
from mmkernels.pretrain.data.seeds import SampleDraws
from mmkernels.pretrain.data.tiles import COLOURS
from mmkernels.pretrain.data.vocabulary import NUMBERS, PLURALS, WORDS, counted, listed, with_article

PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
ANSWERS: tuple[str, ...] = ("yes", "no", *NUMBERS[:5], *COLOURS, *PLACES, *WORDS)
KINDS = ("what", "where", "how many", "colour", "is there")
CAPTION_FORMS = 5

_SIDE_PHRASES = {"left of": "on the left", "right of": "on the right", "above": "at the top", "below": "at the bottom"}
_CLEAR = 2  # units of the grid by which a centre must be inside or outside a third of the canvas


class Asked(NamedTuple):
    """A question, in words that mean the same, with its answer (one of ANSWERS) and its kind (one of KINDS)."""

    questions: tuple[str, ...]
    answer: str
    kind: str


def captions(scene: Scene, colours: Sequence[str]) -> tuple[str, ...]:
    """Five captions, one of each form.

    Args:
        scene: what to describe.
        colours: of each word as drawn in the scene, "" if it has none.
    """
    plain, coloured = [""] * len(WORDS), colours

    def said(groups: Sequence[Group], colours: Sequence[str]) -> str:
        return listed([counted(word, count, colours[word]) for word, count in groups])

    first, second = said(scene.first, plain), said(scene.second, plain)
    here, there = _SIDE_PHRASES[scene.side], _SIDE_PHRASES[OPPOSITE[scene.side]]
    return (
        f"{said(scene.first, coloured)} {scene.side} {said(scene.second, coloured)}",
        f"{second} {OPPOSITE[scene.side]} {first}",
        f"{here} {first}, {there} {second}",
        f"a picture of {said(scene.groups, plain)}",
        said(scene.groups, coloured),
    )


def ask(scene: Scene, colours: Sequence[str], draws: SampleDraws) -> Asked:
    """A question that the scene answers without doubt, each kind as likely where it is possible.

    Args:
        scene: what to ask about.
        colours: as in `captions`.
        draws: decide which question.
    """
    askers: tuple[Callable[[Scene, Sequence[str], SampleDraws], Asked | None], ...]
    askers = (_what, _where, _how_many, _colour, _is_there)
    asked = (askers[i](scene, colours, draws) for i in draws.shuffled(len(askers)))
    return next(found for found in asked if found is not None)


def beside(scene: Scene) -> list[tuple[str, int, list[int]]]:
    """(side, word, objects): where the objects, by index, are all that lies on that side of the only object of a word.

    At least one of them lies there entirely, and every other object's centre lies elsewhere.
    """
    found = []
    counts = dict(scene.groups)
    for at, word in enumerate(scene.words):
        if counts[word] > 1:
            continue
        for side in SIDES:
            there = [i for i, box in enumerate(scene.boxes) if _lead(box, scene.boxes[at], side, 0.5) > 0]
            if any(_lead(scene.boxes[i], scene.boxes[at], side, 1.0) >= 0 for i in there):
                found.append((side, word, there))
    return found


def _lead(a: Box, b: Box, side: str, extent: float) -> float:
    """How far a lies on a side of b: by their centres for extent=0.5, by the gap between them for 1."""
    axis = 0 if side in ("left of", "right of") else 1
    if side in ("left of", "above"):
        a, b = b, a  # a is right of b, or below, from here on
    return (a[axis + 2] - extent * (a[axis + 2] - a[axis])) - (b[axis] + extent * (b[axis + 2] - b[axis]))


def place_of(box: Box) -> str:
    """The one of PLACES in which a box has its centre, or "" if that is too close to another."""
    x, y = box[0] + box[2], box[1] + box[3]  # twice the centre
    if any(abs(3 * z - 2 * GRID * k) < 6 * _CLEAR for z in (x, y) for k in (1, 2)):
        return ""
    return PLACES[3 * (3 * y // (2 * GRID)) + 3 * x // (2 * GRID)]


def _what(scene: Scene, colours: Sequence[str], draws: SampleDraws) -> Asked | None:
    options = [(side, word, scene.words[there[0]]) for side, word, there in beside(scene) if _alike(scene, there)]
    if not options:
        return None
    side, word, answer = options[draws.below(len(options))]
    questions = f"what is {side} the {WORDS[word]}?", f"what can you see {side} the {WORDS[word]}?"
    return Asked(questions, WORDS[answer], "what")


def _alike(scene: Scene, objects: list[int]) -> bool:
    return len({scene.words[i] for i in objects}) == 1


def _where(scene: Scene, colours: Sequence[str], draws: SampleDraws) -> Asked | None:
    counts = dict(scene.groups)
    placed = ((word, place_of(box)) for word, box in zip(scene.words, scene.boxes, strict=True) if counts[word] == 1)
    options = [(word, place) for word, place in placed if place]
    if not options:
        return None
    word, place = options[draws.below(len(options))]
    questions = f"where is the {WORDS[word]}?", f"in which part of the picture is the {WORDS[word]}?"
    return Asked(questions, place, "where")


def _how_many(scene: Scene, colours: Sequence[str], draws: SampleDraws) -> Asked | None:
    """Each number that occurs is as likely as the others, and so is zero."""
    numbers = sorted({0, *(count for _, count in scene.groups)})
    number = numbers[draws.below(len(numbers))]
    options = [word for word, count in scene.groups if count == number]
    word = options[draws.below(len(options))] if number else _absent(scene, draws)
    questions = f"how many {PLURALS[word]} are there?", f"how many {PLURALS[word]} can you see?"
    return Asked(questions, NUMBERS[number], "how many")


def _colour(scene: Scene, colours: Sequence[str], draws: SampleDraws) -> Asked | None:
    """About what is beside something, if possible: an apple by its name would often be red without looking."""
    options = [(side, word, there[0]) for side, word, there in beside(scene) if len(there) == 1]
    options = [(side, word, i) for side, word, i in options if colours[scene.words[i]]]
    if options:
        side, word, i = options[draws.below(len(options))]
        question = f"what colour is the thing {side} the {WORDS[word]}?"
        return Asked((question,), colours[scene.words[i]], "colour")
    groups = [(word, count) for word, count in scene.groups if colours[word]]
    if not groups:
        return None
    word, count = groups[draws.below(len(groups))]
    question = f"what colour is the {WORDS[word]}?" if count == 1 else f"what colour are the {PLURALS[word]}?"
    return Asked((question,), colours[word], "colour")


def _is_there(scene: Scene, colours: Sequence[str], draws: SampleDraws) -> Asked | None:
    there = draws.below(2) == 0
    word = scene.groups[draws.below(len(scene.groups))][0] if there else _absent(scene, draws)
    name = with_article(WORDS[word])
    return Asked((f"is there {name}?", f"can you see {name}?"), "yes" if there else "no", "is there")


def _absent(scene: Scene, draws: SampleDraws) -> int:
    """A word of which the scene has none."""
    present = sorted(word for word, _ in scene.groups)
    word = draws.below(len(WORDS) - len(present))
    for each in present:
        word += word >= each
    return word


def related(scene: Scene, draws: SampleDraws) -> tuple[int, int, str]:
    """Two objects, by index, and the one of RELATIONS that the first has to the second."""
    pairs = permutations(range(len(scene.words)), 2)
    options = [(a, b, relation) for a, b in pairs if (relation := relation_of(scene.boxes[a], scene.boxes[b]))]
    return options[draws.below(len(options))]
