"""What the tokens of a text write: the bytes of one character together, and words."""

from __future__ import annotations

from collections.abc import Sequence

from mmkernels.pretrain.tokenizer import SPECIAL, TextTokenizer

__all__ = ["pieces_of", "words_of"]


def pieces_of(tokenizer: TextTokenizer, ids: Sequence[int]) -> list[tuple[str, list[int]]]:
    """(What is written, with the space before it; the places of the tokens that write it, of which a character may need
    several)."""
    found: list[tuple[str, list[int]]] = []
    begun: list[int] = []
    for place, text in enumerate(tokenizer.pieces(ids)):
        begun.append(place)
        if text:
            found.append((text, begun))
            begun = []
    return found


def words_of(tokenizer: TextTokenizer, ids: Sequence[int]) -> list[tuple[str, list[int]]]:
    """(A word, the places of its tokens): what begins with a space begins a word; special tokens are none."""
    words: list[tuple[str, list[int]]] = []
    for text, places in pieces_of(tokenizer, ids):
        if ids[places[-1]] < len(SPECIAL):
            words.append(("", []))  # the next token begins a word
        elif not words or text[:1].isspace():
            words.append((text.strip(), places))
        else:
            words[-1] = (words[-1][0] + text, [*words[-1][1], *places])
    return [(word, places) for word, places in words if word]
