"""Pictures of detections as files and in notebooks."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from tailseg.data.annotations.annotations import Category
from tailseg.data.images import FORMATS
from tailseg.errors import UserError
from tailseg.structures import RawDetections
from tailseg.visualize.draw import draw_detections

SHOWN_SIDE = 640  # pixels of the longer side of a picture in a notebook, which keeps it in its file
_QUALITY = 95  # of JPEG and WebP: thin outlines and small letters suffer first
_EFFORT = 3  # of PNG: photographs in six tenths of the time of the usual 6, 2 % larger
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
    Image.fromarray(picture).save(buffer, format=kind, quality=_QUALITY, compress_level=_EFFORT)
    return buffer.getvalue()


def shown_png(picture: NDArray[np.uint8], raw: RawDetections, categories: Sequence[Category]) -> bytes:
    """The drawn picture as a PNG for a notebook, its longer side at most `SHOWN_SIDE` pixels.

    A larger picture is shrunk before it is drawn on, so that names can be read.
    """
    image = Image.fromarray(drawn(*shrunk(picture, raw, SHOWN_SIDE), categories))
    image.thumbnail((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.LANCZOS)  # a small one was enlarged
    return image_bytes(np.asarray(image), "PNG")


def shrunk(picture: NDArray[np.uint8], raw: RawDetections, side: int) -> tuple[NDArray[np.uint8], RawDetections]:
    """A picture, its longer side at most ``side`` pixels, and its objects in the new pixels."""
    height, width = picture.shape[:2]
    factor = side / max(height, width)
    if factor >= 1:
        return picture, raw
    hw = (max(1, round(factor * height)), max(1, round(factor * width)))
    smaller = np.asarray(cv2.resize(picture, hw[::-1], interpolation=cv2.INTER_AREA), dtype=np.uint8)
    scale = torch.tensor([hw[1] / width, hw[0] / height] * 2)
    return smaller, replace(raw, image_hw=hw, boxes=raw.boxes * scale)


def drawn(picture: NDArray[np.uint8], raw: RawDetections, categories: Sequence[Category]) -> NDArray[np.uint8]:
    """The picture with all objects, see `draw_detections`."""
    names, ids = [category.name for category in categories], [category.id for category in categories]
    return draw_detections(picture, raw, names, ids=ids, min_score=0)
