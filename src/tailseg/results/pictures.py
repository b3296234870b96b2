"""Pictures of detections as files and in notebooks."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tailseg.data.images import FORMATS
from tailseg.errors import UserError

SHOWN_SIDE = 640  # pixels of the longer side of a picture in a notebook, which keeps it in its file
_QUALITY = 95  # of JPEG and WebP: thin outlines and small letters suffer first
_KINDS = {suffix: kind for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}


def image_kind(path: Path) -> str:
    """Pillow's name of the format of a file to be written, by its suffix.

    Raises:
        UserError: the suffix is none of an image format.
    """
    kind = _KINDS.get(path.suffix.lower())
    if kind is None or kind not in Image.SAVE:
        raise UserError(f"{path}: the suffix {path.suffix!r} names no format; use .png, .jpg, .webp or .json")
    return kind


def image_bytes(picture: NDArray[np.uint8], kind: str) -> bytes:
    """A picture (H, W, 3) uint8 RGB as the content of a file; ``kind`` is Pillow's name of the format."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format=kind, quality=_QUALITY)
    return buffer.getvalue()


def shown_png(picture: NDArray[np.uint8]) -> bytes:
    """A picture as a PNG for a notebook, its longer side at most `SHOWN_SIDE` pixels."""
    image = Image.fromarray(picture)
    image.thumbnail((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.LANCZOS)
    return image_bytes(np.asarray(image), "PNG")
