"""Images of a batch as data URIs: small, and loaded from nowhere."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

LARGEST_SIDE = 224
"""Pixels; a larger image is scaled down for the page."""
EXACT_SIDE = 96
"""Images up to this many pixels a side are kept bit for bit (PNG); larger ones become JPEG."""
JPEG_QUALITY = 80


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownImage:
    """uint8 [3, H, W] pixels, and in words what they are (caption and alternative text)."""

    pixels: np.ndarray
    title: str


def data_uri(pixels: np.ndarray) -> tuple[str, int, int]:
    """uint8 [3, H, W] as a data URI, with the width and height that it has there."""
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    buffer = io.BytesIO()
    if max(image.size) <= EXACT_SIDE:
        image.save(buffer, format="PNG", optimize=True)
        kind = "png"
    else:
        image.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
        image.save(buffer, format="JPEG", quality=JPEG_QUALITY, optimize=True)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}", *image.size
