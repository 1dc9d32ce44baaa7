"""Settings that make a run of any recipe small, for tests."""

from __future__ import annotations

from typing import Any

TINY: dict[str, Any] = {
    "model.width": 16,
    "model.heads": 2,
    "model.embed_dim": 8,
    "model.dropout": 0.1,
    "streams.image.encoder.size": 16,
    "streams.image.encoder.layers": 1,
    "streams.text.encoder.layers": 1,
    "streams.text.encoder.words": 64,
    "streams.text.encoder.grams": 64,
}
"""Of clip and siglip."""
