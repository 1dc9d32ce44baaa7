"""What a cell of a table, or a field of JSON, says about an image: its captions, or why there are none."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from mmkernels.pretrain.data.unicode import unicode_fault

__all__ = ["LONGEST", "caption_fault", "parse_captions"]

LONGEST = 131_072  # characters; more is no caption, but a quote that was never closed or the wrong column


def caption_fault(text: str) -> str:
    """What keeps a text from being a caption, or nothing."""
    if len(text) > LONGEST:
        return f"a caption of {len(text)} characters, where {LONGEST} are allowed"
    return unicode_fault(text)


def parse_captions(value: Any) -> tuple[list[str], str]:
    """One caption or several: a text, a list of texts, or a JSON list of texts as text. Blank ones are left out.

    Returns:
        the captions, and what is wrong with them; one of the two is empty.
    """
    found = value
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):  # then it is a caption that merely starts with a bracket
            found = json.loads(value)
    texts = [text for text in (found if isinstance(found, list) else [found]) if text is not None]
    if all(isinstance(text, str) for text in texts):
        captions = [text.strip() for text in texts if text.strip()]
        if captions:
            fault = next((fault for text in captions if (fault := caption_fault(text))), "")
            return ([], fault) if fault else (captions, "")
    return [], f"expected text or a list of texts, got {_short(value)}"


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:80]}..."
