"""What a report looks for: the kinds of findings, as `--drop` names them."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["KINDS", "Finding", "Kind", "chosen"]


@dataclass(frozen=True)
class Kind:
    """A kind of finding."""

    title: str
    meaning: str


KINDS = {
    "broken": Kind("Broken", "cannot be read: training skips it, too, and counts it"),
    "empty": Kind("Empty caption", "no letter, digit or symbol that can be seen in any caption"),
    "boilerplate": Kind(
        "Boilerplate caption",
        "a file name, a link, markup, a phrase of picture agencies, or a caption that at least 10 different pictures "
        "share, 1% of the set, and ten times as many as share the median caption",
    ),
    "long": Kind("Caption too long", "every caption has more tokens than the text encoder reads"),
    "script": Kind(
        "Other script", "most letters are of another script than those of 95% of the field's texts (Han suits Kana)"
    ),
    "blank": Kind("Blank picture", "one colour"),
    "duplicates": Kind("Duplicate", "the same pixels, texts and labels as an earlier sample of its split"),
    "near-duplicates": Kind(
        "Near-duplicate",
        "a picture, and texts, that are nearly those of an earlier sample of its split; the same labels",
    ),
    "same-picture": Kind(
        "Same picture, other text", "a picture that is nearly an earlier one's, with other texts or labels"
    ),
    "leaked": Kind("Leaked", "a training sample whose picture (without one: whose text) is nearly a held-out one's"),
}
"""In the order of the page."""


@dataclass(frozen=True)
class Finding:
    """One sample (or row that is none) and what was found about it."""

    kind: str
    split: str
    index: int | None  # in the split; None for a row that is no sample
    name: str
    why: str
    of: tuple[str, int] | None = None  # split and index of the sample that it repeats
    readable: bool = True


def chosen(drop: tuple[str, ...]) -> tuple[str, ...]:
    """The kinds that `--drop` names, with commas or spaces in between. Raise ValueError for one that is none."""
    names = tuple(dict.fromkeys(name for each in drop for name in each.split(",") if name))
    unknown = [name for name in names if name not in KINDS]
    if unknown:
        raise ValueError(f"drop: expected some of {', '.join(KINDS)}, got {', '.join(unknown)}")
    return names
