"""The best caption that knows nothing of its sample: what captions are worth that a model writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mmkernels.pretrain.data.spaced import spaced
from mmkernels.pretrain.metrics.base import HeldOut
from mmkernels.pretrain.metrics.cider import Cider, words

__all__ = ["best_constant", "constant_of", "references_of"]

_TRAINING = 600  # samples that it is chosen with; one in six is a candidate


def references_of(value: Any) -> tuple[str, ...]:
    """The captions of a `Text` or a str that have words."""
    texts = (value,) if isinstance(value, str) else getattr(value, "captions", ())
    return tuple(text for text in texts if words(text))


def best_constant(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> str:
    """The candidate with the highest mean CIDEr-D as the caption of every sample; the first one of equals."""
    cider = Cider(references)
    return max(dict.fromkeys(candidates), key=lambda text: cider.everywhere(text).mean(), default="")


def constant_of(held_out: HeldOut, field: str, of: Callable[[Any], Sequence[str]] = references_of) -> str:
    """The caption, of evenly spaced training samples, with the highest mean CIDEr-D against those of others.

    Args:
        held_out: has the training data; in one evaluation the caption is chosen once.
        field: that has the captions.
        of: from a value of the field to its captions, of which there may be none.
    """

    def chosen() -> str:
        train = held_out.train
        items = spaced(len(train), _TRAINING)
        found = [captions for i in items if (captions := of(train.peek(int(i)).get(field)))]
        candidates, others = found[::6], [each for i, each in enumerate(found) if i % 6]
        return best_constant([text for each in candidates for text in each], others or candidates)

    return held_out.once(("constant caption", field, of.__name__), chosen)
