"""The things that scenes and clips show: plain words for emoji that every vendor draws.

No word stands for an emoji that the emoji data set holds out as a concept (its splits B and C), so that all of them may
be trained on together.
"""

from __future__ import annotations

# What an emoji is called here, where that is not its own name.
RENAMED = {
    "apple": "red apple", "bee": "honeybee", "book": "closed book", "burger": "hamburger", "cake": "birthday cake",
    "car": "automobile", "cat": "grinning cat", "clock": "alarm clock", "cow": "cow face", "diamond": "gem stone",
    "dog": "dog face", "drop": "droplet", "flame": "fire", "football": "soccer ball", "hat": "top hat",
    "heart": "red heart", "ladybug": "lady beetle", "leaf": "maple leaf", "lock": "locked", "monkey": "monkey face",
    "moon": "crescent moon", "motorbike": "motorcycle", "mouse": "mouse face", "pepper": "hot pepper",
    "phone": "telephone", "pig": "pig face", "plane": "airplane", "present": "wrapped gift", "rabbit": "rabbit face",
    "shirt": "t-shirt", "shoe": "running shoe", "tiger": "tiger face", "tree": "evergreen tree",
}  # fmt: skip

KINDS = {
    "animal": "bear bee bird butterfly cat cow crab dog duck elephant fish fox frog horse ladybug lion monkey mouse "
    "octopus owl panda penguin pig rabbit snail snake spider tiger turtle whale",
    "food": "apple avocado banana burger cake carrot cookie doughnut egg eggplant mushroom peach pear pepper pineapple "
    "tomato watermelon",
    "object": "backpack basketball bell book camera clock crown diamond drum football ghost guitar hammer hat heart "
    "key lock pencil phone present robot shirt shoe trophy trumpet umbrella",
    "vehicle": "bicycle bus car helicopter motorbike plane rocket ship train",
    "nature": "cactus castle cloud drop flame house leaf moon rainbow rose star sun sunflower tree",
}
WORDS: tuple[str, ...] = tuple(sorted(" ".join(KINDS.values()).split()))
EMOJI: tuple[str, ...] = tuple(RENAMED.get(word, word) for word in WORDS)  # the name of each in the pack

_PLURALS = {"butterfly": "butterflies", "fish": "fish", "leaf": "leaves", "mouse": "mice", "tomato": "tomatoes"}
_PLURALS |= {"trophy": "trophies"}
PLURALS: tuple[str, ...] = tuple(
    _PLURALS.get(word, word + ("es" if word.endswith(("s", "x", "ch")) else "s")) for word in WORDS
)
NUMBERS = ("zero", "one", "two", "three", "four", "five")


def with_article(phrase: str) -> str:
    """`an apple`, `a red apple`: by the first letter, which no word here sounds unlike, as a unicorn does."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def counted(word: int, count: int, colour: str = "") -> str:
    """`an apple`, `two red apples`.

    Args:
        word: index into WORDS.
        count: how many, 1 to 5.
        colour: of all of them; "" for none.
    """
    adjective = f"{colour} " if colour else ""
    if count == 1:
        return with_article(adjective + WORDS[word])
    return f"{NUMBERS[count]} {adjective}{PLURALS[word]}"


def listed(phrases: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
