"""Documents as examples: images with their captions, and last an image whose caption is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from mmkernels.pretrain.data.base import Document, Sample
from mmkernels.pretrain.metrics.base import HeldOut
from mmkernels.pretrain.tokenizer import IMAGE

__all__ = ["Pair", "asking", "last_caption", "pairs_of", "with_pairs"]

Pair = tuple[Any, str]  # an image and the text that follows it


def pairs_of(document: Any) -> list[Pair]:
    """The images, each with the text that follows it, with which a document ends; none for something else."""
    parts, pairs = list(getattr(document, "parts", ())), []
    while len(parts) >= 2 and isinstance(parts[-1], str) and not isinstance(parts[-2], str):
        text, image = parts.pop(), parts.pop()
        pairs.append((image, text))
    return pairs[::-1]


def last_caption(document: Any) -> tuple[str, ...]:
    """As the references of the document; none for something else."""
    return tuple(text for _, text in pairs_of(document)[-1:])


def asking(sample: Sample, field: str, pairs: list[Pair]) -> Sample:
    """The sample with these pairs as its document, up to the last image."""
    *examples, (image, _) = pairs
    parts = (*(part for pair in examples for part in pair), image)
    return replace(sample, values={**sample.values, field: Document(parts)})


def with_pairs(held_out: HeldOut, stream: str, least: int) -> Iterator[list[tuple[int, Sample, list[Pair]]]]:
    """Held-out samples, with their numbers and the last pairs of their documents, some at a time.

    Args:
        held_out: the samples.
        stream: that has the documents' texts.
        least: pairs; documents that end with fewer, or whose texts are longer than the encoder allows, are left out.
    """
    source, collator, numbers = held_out.source, held_out.collator, held_out.items()
    part = collator.streams[stream]
    field = part.field or stream

    def fits(sample: Sample, pairs: list[Pair]) -> bool:
        (piece,) = part.encoder.prepare([asking(sample, field, pairs).values[field]], collator.tokenizer)
        return int(piece.tokens[-1]) == IMAGE  # a text that is too long loses its end

    for first in range(0, len(numbers), held_out.samples):
        read = source.read_some(numbers[first : first + held_out.samples])
        for name, reason in read.broken.items():
            source.broken.add(name, reason)
        pairs = [pairs_of(sample.values.get(field))[-least:] for sample in read.samples]
        rows = zip(read.items, read.samples, pairs, strict=True)
        yield [row for row in rows if len(row[2]) == least and fits(*row[1:])]
