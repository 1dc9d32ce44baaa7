"""Parse a table cell or JSON field into captions, or the reason why there are none."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from mmkernels.pretrain.data.unicode import unicode_fault

__all__ = ["EMPTY_FILE", "LONGEST", "caption_fault", "parse_captions", "says_empty", "short"]

EMPTY_FILE = "an empty .txt"
_EMPTY = "(empty)"  # ends the reason why a blank value has no captions

LONGEST = 131_072  # characters; more means an unclosed quote or the wrong column


def caption_fault(text: str) -> str:
    """Why a text cannot be a caption; empty if it can."""
    if len(text) > LONGEST:
        return f"a caption of {len(text)} characters; at most {LONGEST} are allowed"
    return unicode_fault(text)


def parse_captions(value: Any) -> tuple[list[str], str]:
    """One caption or several: a text, a list of texts, or a JSON list of texts as text. Blank ones are left out.

    Returns:
        the captions, and the reason why there are none; one of the two is empty.
    """
    found = value
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):  # a caption that merely starts with a bracket
            found = json.loads(value)
    texts = [text for text in (found if isinstance(found, list) else [found]) if text is not None]
    if all(isinstance(text, str) for text in texts):
        captions = [text.strip() for text in texts if text.strip()]
        if captions:
            fault = next((fault for text in captions if (fault := caption_fault(text))), "")
            return ([], fault) if fault else (captions, "")
    empty = f" {_EMPTY}" if all(isinstance(text, str) for text in texts) else ""
    return [], f"expected text or a list of texts, got {short(value)}{empty}"


def says_empty(reason: str) -> bool:
    """Whether a sample is broken because its text is blank."""
    return reason.endswith((_EMPTY, EMPTY_FILE))


def short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:80]}..."
