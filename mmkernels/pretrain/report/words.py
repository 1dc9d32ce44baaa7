"""Masked words: a held-out text with its masked places, and what the model guesses there."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmkernels.pretrain.objectives.masked_tokens import MaskedTokensLoss
from mmkernels.pretrain.report.section import (
    Guess,
    Run,
    Section,
    first_set,
    guesses,
    objectives_of,
    some,
    titled,
)
from mmkernels.pretrain.report.shown import picture_of
from mmkernels.pretrain.tokenizer import MASK

__all__ = ["masked_words"]

_TEXTS, _PLACES = 6, 6
_ABOUT = (
    "Split {split}: texts with the masked words in boxes, green where the first guess is right; below, the likeliest "
    "guesses for each."
)


@dataclass(frozen=True)
class Place:
    number: int  # from 1
    word: str  # that was there
    saw: str  # what the model saw there, if it was not a mask
    guesses: list[Guess]

    @property
    def right(self) -> bool:
        return self.guesses[0].right


@dataclass(frozen=True)
class MaskedText:
    picture: str | None
    pieces: list[tuple[str, str, Place | None]]  # in the order of the text: the space before, the piece
    places: list[Place]  # the first of them
    more: int  # further places


def masked_words(run: Run) -> list[Section]:
    held_out = first_set(run)
    return (
        []
        if held_out is None
        else [
            Section(
                "words", titled("Masked words", name, run, MaskedTokensLoss), _ABOUT.format(split=held_out.name), texts
            )
            for name, objective in objectives_of(run, MaskedTokensLoss)
            if (texts := _texts(run, name, objective))
        ]
    )


def _texts(run: Run, name: str, objective: MaskedTokensLoss) -> list[MaskedText]:
    held_out = first_set(run)
    batch = None if held_out is None else some(held_out, 4 * _TEXTS, "loss", name)  # some may have nothing masked
    if held_out is None or batch is None:
        return []
    chunk, packed, tokenizer = run.trained.whole(batch, name), batch[objective.stream], held_out.collator.tokenizer
    (rows, targets), (logits, _) = objective.masked(chunk), objective.logits(chunk)
    found, of = [], objective.owners(chunk).tolist()
    for sample in list(dict.fromkeys(of))[:_TEXTS]:
        mine = [n for n, owner in enumerate(of) if owner == sample]
        places = {}
        for number, n in enumerate(mine, 1):
            row, target = int(rows[n]), int(targets[n])
            seen = int(packed.tokens[row])
            saw = "" if seen == MASK else tokenizer.piece(seen)
            places[row] = Place(number, tokenizer.piece(target), saw, guesses(logits[n], target, tokenizer.piece))
        begin, end = packed.cu_seqlens_host[sample : sample + 2]
        ids = packed.tokens[begin:end].clone()
        at = torch.tensor([row - begin for row in places], device=ids.device)
        ids[at] = targets[mine]  # the text as it was
        texts = list(enumerate(tokenizer.pieces(ids.tolist()), begin))[1:-1]  # it begins and ends with special tokens
        pieces = [(" " * text[:1].isspace(), text.lstrip(), places.get(row)) for row, text in texts]
        picture = picture_of(held_out.source[batch.numbers[sample]])
        every = list(places.values())
        found.append(MaskedText(picture, pieces, every[:_PLACES], len(every[_PLACES:])))
    return found
