"""What a run's report shows beside its figures: a section for each thing that its recipe does."""

from __future__ import annotations

import logging
from collections.abc import Callable

from mmkernels.pretrain.evaluate import evaluating
from mmkernels.pretrain.report.answers import answers
from mmkernels.pretrain.report.attention import attention_maps
from mmkernels.pretrain.report.captions import captions
from mmkernels.pretrain.report.next_words import next_words
from mmkernels.pretrain.report.pairs import matched_pairs
from mmkernels.pretrain.report.patches import masked_patches
from mmkernels.pretrain.report.regions import masked_regions
from mmkernels.pretrain.report.retrieved import retrieved
from mmkernels.pretrain.report.section import Run, Section
from mmkernels.pretrain.report.words import masked_words

__all__ = ["MAKERS", "sections_of"]

log = logging.getLogger("mmkernels.pretrain.report")

# In the order of the page. Each looks at the recipe and returns no section if there is nothing to show.
MAKERS: list[Callable[[Run], list[Section]]] = [
    answers,
    captions,
    next_words,
    masked_words,
    masked_regions,
    masked_patches,
    attention_maps,
    matched_pairs,
    retrieved,
]


def sections_of(run: Run) -> list[Section]:
    """All sections that there is something to show in. One that fails takes its place with the reason, and the error
    is logged: a finished run does not end with a traceback because of a picture."""
    found: list[Section] = []
    with evaluating(run.trained):
        for make in MAKERS:
            try:
                found += make(run)
            except Exception as error:
                log.exception("the report's section %s could not be made", make.__name__)
                words = make.__name__.replace("_", " ")
                reason = f"This section could not be made: {type(error).__name__}: {error}"
                found.append(Section("failed", words.capitalize(), reason, None))
    return found
