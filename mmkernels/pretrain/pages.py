"""Pictures inside a page."""

from __future__ import annotations

import base64
from io import BytesIO

import numpy as np
from PIL import Image

__all__ = ["data_url"]

_MOST = 160  # pixels a side; larger pictures are shrunk, so that the page stays small


def data_url(image: np.ndarray) -> str:
    """uint8 [H, W, 3 or 4] as a PNG data URL."""
    picture = Image.fromarray(np.ascontiguousarray(image), "RGBA" if image.shape[2] == 4 else "RGB")
    picture.thumbnail((_MOST, _MOST))
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
