"""Answers: right ones and given ones, with the picture and the question."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from mmkernels.pretrain.metrics import HeldOut
from mmkernels.pretrain.objectives.answer import AnswerLoss
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
    texts_beside,
    titled,
    told_by,
)

__all__ = ["answers"]

_QUESTIONS = 12


@dataclass(frozen=True)
class Answered:
    picture: str | None
    question: str  # the texts that the model reads
    answer: str
    guesses: list[Guess]


def answers(run: Run) -> list[Section]:
    sections = []
    for name, objective in objectives_of(run, AnswerLoss):
        if shown := first_found(run, partial(_answered, run, name, objective)):
            held_out, found = shown
            about = f"Split {held_out.name}: what is read, and the likeliest answers; the right one is green."
            sections.append(Section("answers", titled("Answers", name, run, AnswerLoss), about, found))
    return sections


def _answered(run: Run, name: str, objective: AnswerLoss, held_out: HeldOut) -> list[Answered]:
    batch = some(held_out, 2 * _QUESTIONS, "loss", name)
    if batch is None:
        return []
    chunk, names = run.trained.whole(batch, name), held_out.train.classes[objective.part.label]
    (logits, targets), read, found = objective.logits(chunk), objective.part.read, []
    asked = list(enumerate(zip(objective.owners(chunk).tolist(), targets.tolist(), strict=True)))
    for n, (row, target) in spread_over(asked, _QUESTIONS):
        question = " ".join(texts_beside(run, held_out, batch, row, told_by(run, held_out, read)))
        picture = picture_beside(run, held_out, batch, row, read)
        found.append(Answered(picture, question, names[target], guesses(logits[n], target, names.__getitem__)))
    return found
