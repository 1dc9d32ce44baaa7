"""How good a caption is that a model of documents writes after some examples: images with their captions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from mmkernels.pretrain.generate import generate, writer
from mmkernels.pretrain.metrics.base import Figure, HeldOut
from mmkernels.pretrain.metrics.cider import Cider
from mmkernels.pretrain.metrics.constant_caption import constant_of
from mmkernels.pretrain.metrics.document_pairs import Pair, asking, last_caption, with_pairs
from mmkernels.pretrain.tokenizer import EOS

__all__ = ["Asked", "Shots"]


class Asked(NamedTuple):
    """Captions of the last images of n documents."""

    items: list[int]  # numbers of the samples
    pairs: list[list[Pair]]  # the examples of each, and last what was asked for
    texts: list[str]
    cut: list[bool]  # whether a text was cut before its end


@dataclass(frozen=True)
class Shots:
    """The caption of the last image of held-out documents, after some of the images and captions before it: CIDEr-D
    against the document's own. The documents are the same for every number of examples: those that end with enough
    pairs of an image and a text. Chance is the best constant caption: of the last captions of training documents, that
    with the highest CIDEr-D for others. Beside each there is the figure with the fusion's gates shut."""

    objective: str = ""
    """Name of the objective, a `NextToken` of documents."""
    shots: tuple[int, ...] = (0, 2, 4)
    """Numbers of examples."""
    most_tokens: int = 32
    """Longer captions are cut."""
    limit: int = 32
    """Most documents of a held-out set, evenly spaced."""

    def __post_init__(self) -> None:
        for name in ("most_tokens", "limit"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not self.shots or min(self.shots) < 0 or len(set(self.shots)) < len(self.shots):
            raise ValueError(f"shots: expected different numbers from 0, got {self.shots!r}")

    def measure(self, model: Any, held_out: HeldOut) -> list[Figure]:
        stream = writer(model, self.objective).stream
        field, figures = held_out.collator.streams[stream].field or stream, []
        constant = constant_of(held_out, field, last_caption)
        for shots in self.shots:
            for way, shut in (("", False), (", gates shut", True)):
                found = self.write(model, held_out, shots, shut=shut)
                if not found.items:
                    return []
                cider = Cider([(pairs[-1][1],) for pairs in found.pairs])
                figure = Figure.of_each(
                    f"{self.objective}: CIDEr, {shots} shots{way}",
                    cider.each(found.texts),
                    float(cider.everywhere(constant).mean()),
                    clusters=held_out.source.concepts[found.items],
                    percent=False,
                    headline=shots == max(self.shots) and not shut,
                )
                figures.append(figure)
        return figures

    def write(
        self, model: Any, held_out: HeldOut, shots: int, *, count: int | None = None, shut: bool = False
    ) -> Asked:
        """Captions of the last images.

        Args:
            model: in evaluation mode, without gradients; its fusion has gates.
            held_out: the samples.
            shots: number of examples.
            count: of samples; None: `limit`.
            shut: with the gates shut.
        """
        stream, decode = writer(model, self.objective).stream, held_out.collator.tokenizer.decode
        limits = [each for each in (count or self.limit, held_out.limit) if each is not None]
        field, found = held_out.collator.streams[stream].field or stream, Asked([], [], [], [])
        for rows in with_pairs(replace(held_out, limit=min(limits)), stream, max(self.shots) + 1):
            if not rows:
                continue
            items, pairs = [item for item, _, _ in rows], [each[-1 - shots :] for _, _, each in rows]
            samples = [asking(sample, field, each) for (_, sample, _), each in zip(rows, pairs, strict=True)]
            batch = held_out.collator(samples, items, mode="plain").to(held_out.device)
            with _gates(model, shut):
                ids = generate(model, self.objective, batch, self.most_tokens)
            found.items.extend(items)
            found.pairs.extend(pairs)
            found.texts.extend(map(decode, ids))
            found.cut.extend(each[-1] != EOS for each in ids)
        return found


@contextmanager
def _gates(model: Any, shut: bool) -> Iterator[None]:
    if not hasattr(model.fusion, "shut"):
        raise ValueError("metrics: Shots: expected a recipe whose fusion has gates (Gated), got another")
    model.fusion.shut = shut
    try:
        yield
    finally:
        model.fusion.shut = False
