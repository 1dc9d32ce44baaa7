"""Answers: right ones and given ones, with the picture and the question."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmkernels.pretrain.data import Sample, Text
from mmkernels.pretrain.metrics import HeldOut
from mmkernels.pretrain.objectives.answer import AnswerLoss
from mmkernels.pretrain.report.section import Guess, Run, Section, first_set, guesses, objectives_of, some, titled
from mmkernels.pretrain.report.shown import picture_of

__all__ = ["answers"]

_QUESTIONS = 12


@dataclass(frozen=True)
class Answered:
    picture: str | None
    question: str  # the texts that the model reads
    answer: str
    guesses: list[Guess]


def answers(run: Run) -> list[Section]:
    held_out, sections = first_set(run), []
    for name, objective in objectives_of(run, AnswerLoss) if held_out is not None else ():
        assert held_out is not None
        if found := _answered(run, held_out, name, objective):
            about = f"Split {held_out.name}: what is asked, and the likeliest answers; the right one is green."
            sections.append(Section("answers", titled("Answers", name, run, AnswerLoss), about, found))
    return sections


def _answered(run: Run, held_out: HeldOut, name: str, objective: AnswerLoss) -> list[Answered]:
    batch = some(held_out, 2 * _QUESTIONS, "loss", name)
    if batch is None:
        return []
    chunk, names = run.trained.whole(batch, name), held_out.train.classes[objective.part.label]
    logits, targets = objective.logits(chunk)
    found = []
    for n, (row, target) in enumerate(zip(objective.owners(chunk).tolist(), targets.tolist(), strict=True)):
        sample = held_out.source[batch.numbers[row]]
        question = " ".join(_texts(run, objective.part.read, sample))
        likely = guesses(logits[n], target, names.__getitem__)
        found.append(Answered(picture_of(sample), question, names[target], likely))
    return found[:_QUESTIONS]


def _texts(run: Run, read: str, sample: Sample) -> list[str]:
    """Of the stream whose tokens are pooled, if it is a text; otherwise of all that a fusion gave it."""
    streams: Mapping[str, Any] = run.recipe.streams
    own = {read: streams[read]} if read in streams and _text(sample, streams[read].field or read) else streams
    found = (_text(sample, stream.field or name) for name, stream in own.items())
    return [text for text in dict.fromkeys(found) if text] if run.trained.fusion is not None else []


def _text(sample: Sample, field: str) -> str:
    value = sample.values.get(field)
    return value.captions[0] if isinstance(value, Text) else value if isinstance(value, str) else ""
