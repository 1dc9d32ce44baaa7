"""Masked words: a held-out text with its masked places, and what the model guesses there."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from mmkernels.pretrain.metrics import HeldOut
from mmkernels.pretrain.objectives.masked_tokens import MaskedTokensLoss
from mmkernels.pretrain.report.pieces import pieces_of
from mmkernels.pretrain.report.section import (
    Guess,
    Run,
    Section,
    first_found,
    guesses,
    objectives_of,
    picture_beside,
    some,
    spread_over,
    titled,
)
from mmkernels.pretrain.tokenizer import BOS, EOS, MASK

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
    saw: str  # what the model saw there, if it was neither a mask nor the word
    left: bool  # it saw the word
    guesses: list[Guess]

    @property
    def right(self) -> bool:
        return self.guesses[0].right


@dataclass(frozen=True)
class MaskedText:
    picture: str | None
    pieces: list[tuple[str, str, list[Place]]]  # in the order of the text: the space before, the piece, what is masked
    places: list[Place]  # the first of them
    more: int  # further places


def masked_words(run: Run) -> list[Section]:
    sections = []
    for name, objective in objectives_of(run, MaskedTokensLoss):
        if shown := first_found(run, partial(_texts, run, name, objective)):
            held_out, texts = shown
            title = titled("Masked words", name, run, MaskedTokensLoss)
            sections.append(Section("words", title, _ABOUT.format(split=held_out.name), texts))
    return sections


def _texts(run: Run, name: str, objective: MaskedTokensLoss, held_out: HeldOut) -> list[MaskedText]:
    batch = some(held_out, 4 * _TEXTS, "loss", name)  # some may have nothing masked
    if batch is None:
        return []
    chunk, packed, tokenizer = run.trained.whole(batch, name), batch[objective.stream], held_out.collator.tokenizer
    (rows, targets), (logits, _) = objective.masked(chunk), objective.logits(chunk)
    found, of = [], objective.owners(chunk).tolist()
    for sample in spread_over(list(dict.fromkeys(of)), _TEXTS):
        mine = [n for n, owner in enumerate(of) if owner == sample]
        begin, end = packed.cu_seqlens_host[sample : sample + 2]
        places = {}
        for number, n in enumerate(mine, 1):
            row, target = int(rows[n]), int(targets[n])
            seen = int(packed.tokens[row])
            saw = "" if seen in (MASK, target) else tokenizer.piece(seen)
            likely = guesses(logits[n], target, tokenizer.piece)
            place = Place(number, tokenizer.piece(target), saw, seen == target, likely)
            places[row - begin] = place
        ids = packed.tokens[begin:end].clone()
        ids[torch.tensor([*places], device=ids.device)] = targets[mine]  # the text as it was
        ends = {at for at in (0, len(ids) - 1) if int(ids[at]) in (BOS, EOS)}
        pieces = [
            (" " * text[:1].isspace(), text.lstrip(), [places[at] for at in tokens if at in places])
            for text, tokens in pieces_of(tokenizer, ids.tolist())
            if not ends.intersection(tokens)
        ]
        picture = picture_beside(run, held_out, batch, sample, objective.stream)
        every = list(places.values())
        found.append(MaskedText(picture, pieces, every[:_PLACES], len(every[_PLACES:])))
    return found
