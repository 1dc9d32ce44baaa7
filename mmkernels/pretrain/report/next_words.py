"""Next words: how likely the model holds each word of a held-out text, after the true words before it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from mmkernels.pretrain.metrics import HeldOut
from mmkernels.pretrain.objectives.next_token import NextTokenLoss
from mmkernels.pretrain.report.pieces import pieces_of
from mmkernels.pretrain.report.section import (
    Run,
    Section,
    first_found,
    objectives_of,
    picture_beside,
    some,
    texts_beside,
    titled,
    told_by,
)

__all__ = ["next_words"]

_TEXTS = 6
_SURE = 0.1  # the least probability of another token that is shown


@dataclass(frozen=True)
class Next:
    """A token of a text, or the tokens that one character needs."""

    space: str  # before it
    piece: str
    probability: float | None  # None: it is not predicted
    likeliest: str  # another token, if one is likelier; else empty
    sure: bool  # that one has at least _SURE


@dataclass(frozen=True)
class Predicted:
    picture: str | None
    read: list[str]  # the other texts that the model reads
    tokens: list[Next]
    right: float  # share of the predicted tokens that are the likeliest


def next_words(run: Run) -> list[Section]:
    sections = []
    for name, objective in objectives_of(run, NextTokenLoss):
        if shown := first_found(run, partial(_predicted, run, name, objective)):
            held_out, found = shown
            about = (
                f"Split {held_out.name}: the greener a word, the likelier the model held it after the true words "
                f"before it; in small print what it held for likelier, with at least {100 * _SURE:.0f}%."
            )
            sections.append(Section("next_words", titled("Next words", name, run, NextTokenLoss), about, found))
    return sections


def _predicted(run: Run, name: str, objective: NextTokenLoss, held_out: HeldOut) -> list[Predicted]:
    batch = some(held_out, _TEXTS, "loss", name)
    if batch is None:
        return []
    chunk, packed, tokenizer = run.trained.whole(batch, name), batch[objective.stream], held_out.collator.tokenizer
    (rows, targets), (logits, _) = objective.followed(chunk), objective.logits(chunk)
    likely = logits.float().softmax(1)
    most, best = likely.max(1)
    columns = (rows + 1, likely.gather(1, targets[:, None]).flatten(), best, best == targets, most)
    # A row predicts the token after it: row -> (its probability, the first guess, whether that is it, how likely).
    after = {row: tuple(rest) for row, *rest in zip(*(column.tolist() for column in columns), strict=True)}
    others = [each for each in told_by(run, held_out, objective.stream) if each != objective.stream]
    found = []
    for sample in range(batch.samples):
        begin, end = packed.cu_seqlens_host[sample : sample + 2]
        tokens, right = [], []
        for text, places in pieces_of(tokenizer, packed.tokens[begin:end].tolist()):
            told = [after[begin + place] for place in places if begin + place in after]
            probability = math.prod(each for each, *_ in told) if told else None
            right += [is_it for _, _, is_it, _ in told]
            _, guess, is_it, sure = next((each for each in told if not each[2]), (None, 0, True, 0.0))
            likeliest = "" if is_it else tokenizer.piece(guess)
            tokens.append(Next(" " * text[:1].isspace(), text.lstrip(), probability, likeliest, sure >= _SURE))
        if right:
            picture = picture_beside(run, held_out, batch, sample, objective.stream)
            read = texts_beside(run, held_out, batch, sample, others)
            found.append(Predicted(picture, read, tokens[1:], sum(right) / len(right)))
    return found
