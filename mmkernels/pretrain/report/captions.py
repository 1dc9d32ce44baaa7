"""Captions that the model writes, beside the true ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from mmkernels.pretrain.metrics import Captioning, HeldOut, Shots
from mmkernels.pretrain.report.section import Run, Section, first_found
from mmkernels.pretrain.report.shown import drawn

__all__ = ["WrittenCaption", "captions", "generated"]

_SHOWN = 9


@dataclass(frozen=True)
class WrittenCaption:
    """One caption, with what it describes."""

    name: str  # of the sample
    described: Any  # the value of the field: an image is uint8 [H, W, 3 or 4]; None if the model does not read it
    written: str
    true: tuple[str, ...]
    cut: bool  # the limit was reached before the end of the text
    examples: tuple[tuple[Any, str], ...] = ()  # (image, caption) of the document that the model read before


def generated(model: Any, metric: Captioning | Shots, held_out: HeldOut, count: int = 9) -> list[WrittenCaption]:
    """Captions of evenly spaced held-out samples, greedily written.

    Args:
        model: in evaluation mode, without gradients.
        metric: of the recipe; `Shots` writes with as many examples as it has at most.
        held_out: the samples. Those without a caption, or without what it describes, are left out.
        count: of samples.
    """
    if isinstance(metric, Shots):
        asked = metric.write(model, held_out, max(metric.shots), count=count)
        return [
            WrittenCaption(held_out.source.name(item), image, text, (true,), cut, tuple(examples))
            for item, (*examples, (image, true)), text, cut in zip(*asked, strict=True)
        ]
    field = held_out.collator.streams[metric.stream].field or metric.stream
    found = metric.write(model, held_out, count, ablations=False)
    samples = (held_out.source[item] for item in found.items)
    seen = metric.stream not in held_out.collator.without
    return [
        WrittenCaption(sample.name, sample.values.get(field) if seen else None, text, true, cut)
        for sample, text, true, cut in zip(samples, found.texts, found.references, found.cut, strict=True)
    ]


def captions(run: Run) -> list[Section]:
    metrics = [metric for metric in run.recipe.metrics if isinstance(metric, Captioning | Shots)]
    sections = []
    for metric in metrics:
        shown = first_found(run, partial(_written, run, metric)) if metric.objective in run.learned else None
        if shown is None:
            continue
        held_out, found = shown
        what = "picture"
        if isinstance(metric, Captioning) and metric.stream in held_out.collator.without:
            what = f"sample without its {metric.stream}"
        examples = len(found[0].examples)
        below = f"true caption and the {examples} examples that it read before" if examples else "true captions"
        about = f"Split {held_out.name}: what the model writes of each {what}; below it the {below}."
        title = "Written captions" if len(metrics) == 1 else f"Written captions: {metric.objective}"
        title += ", after examples" if examples and len(metrics) > 1 else ""
        sections.append(Section("captions", title, about, [_card(one) for one in found]))
    return sections


def _written(run: Run, metric: Captioning | Shots, held_out: HeldOut) -> list[WrittenCaption]:
    return generated(run.trained, metric, held_out, _SHOWN)


def _card(one: WrittenCaption) -> dict[str, Any]:
    examples = [{"picture": drawn(image), "text": text} for image, text in one.examples]
    return {"picture": drawn(one.described), "examples": examples, "one": one}
