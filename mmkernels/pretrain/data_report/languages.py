"""The language mix of texts, by py3langid; of texts too short for that, by script."""

from __future__ import annotations

import numpy as np
import py3langid

from mmkernels.pretrain.data_report.texts import script_of

__all__ = ["LONG_ENOUGH", "language_of"]

LONG_ENOUGH = 20  # characters of a text whose language can be told
_SURE = 0.8  # probability


def language_of(text: str) -> str:
    """An ISO 639-1 code; `unsure`; or `short, ` and the script."""
    if len(text) < LONG_ENOUGH:
        return f"short, {script_of(text) or 'no letters'}"
    ranked = py3langid.rank(text)
    scores = np.array([score for _, score in ranked], np.float64)
    sure = 1 / np.exp(scores - scores.max()).sum()
    return str(ranked[0][0]) if sure >= _SURE else "unsure"
