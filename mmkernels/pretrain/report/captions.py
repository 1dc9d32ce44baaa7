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
        asked, seen = metric.write(model, held_out, max(metric.shots), count=count), _sees(model, metric, held_out)
        return [
            WrittenCaption(
                held_out.source.name(item),
                image if seen else None,
                text,
                (true,),
                cut,
                tuple((each if seen else None, said) for each, said in examples),
            )
            for item, (*examples, (image, true)), text, cut in zip(*asked, strict=True)
        ]
    field = held_out.collator.streams[metric.stream].field or metric.stream
    found = metric.write(model, held_out, count, ablations=False)
    samples = (held_out.source[item] for item in found.items)
    seen = _sees(model, metric, held_out)
    return [
        WrittenCaption(sample.name, sample.values.get(field) if seen else None, text, true, cut)
        for sample, text, true, cut in zip(samples, found.texts, found.references, found.cut, strict=True)
    ]


def _sees(model: Any, metric: Captioning | Shots, held_out: HeldOut) -> bool:
    """Whether the model reads what it describes: the pictures of documents by a stream that is fused with the text."""
    if isinstance(metric, Captioning):
        return metric.stream not in held_out.collator.without
    written = model.objectives[metric.objective].stream
    others = () if model.fusion is None else model.fusion.told_by(written)
    return bool({*others} - {written} - held_out.collator.without)


def captions(run: Run) -> list[Section]:
    metrics = [metric for metric in run.recipe.metrics if isinstance(metric, Captioning | Shots)]
    sections = []
    for metric in metrics:
        shown = first_found(run, partial(_written, run, metric)) if metric.objective in run.learned else None
        if shown is None:
            continue
        held_out, found = shown
        what = "picture"
        if not _sees(run.trained, metric, held_out):
            what = f"sample without its {metric.stream if isinstance(metric, Captioning) else 'pictures'}"
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
