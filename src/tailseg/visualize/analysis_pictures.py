"""The pictures in which a model does worst: what is annotated beside what it found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from hotcoco import mask as rle
from numpy.typing import NDArray

from tailseg.data.annotations.annotations import Annotations
from tailseg.data.annotations.masks import run_lengths
from tailseg.data.images import read_image
from tailseg.errors import UserError
from tailseg.visualize.draw import SMALL_SIDE, draw_objects
from tailseg.visualize.gallery import jpeg
from tailseg.visualize.page import data_uri

LONGER_SIDE = 560  # pixels of a picture
MOST_OBJECTS = 300  # annotated ones drawn, the largest

Picture = NDArray[np.uint8]


def worst_pictures(annotations: Annotations, worst: Sequence[Mapping[str, Any]]) -> list[tuple[str, str] | None]:
    """Addresses of a picture with the annotated and one with the found objects; None if an image cannot be read.

    Args:
        annotations: the split.
        worst: rows as `tailseg.evaluation.slices.worst_images` makes them.
    """
    labels = {category.id: label for label, category in enumerate(annotations.categories)}
    numbers = {annotations.image_id(image): image for image in range(len(annotations))}
    return [pair_of_pictures(annotations, numbers[row["image_id"]], row["found"], labels) for row in worst]


def pair_of_pictures(
    annotations: Annotations, image: int, found: Sequence[Mapping[str, Any]], labels: Mapping[int, int]
) -> tuple[str, str] | None:
    """Addresses of a picture with its annotated and one with its found objects; None if the image cannot be read.

    Args:
        annotations: the split.
        image: position in it.
        found: rows of a results file.
        labels: of category ids.
    """
    try:
        pixels = read_image(annotations.image_path(image))
    except UserError:
        return None
    height, width = pixels.shape[:2]
    factor = min(1.0, LONGER_SIDE / max(height, width))
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    small = np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)
    scale = None if min(height, width) < SMALL_SIDE else 1
    names = [category.name for category in annotations.categories]
    rows = _annotated(annotations, image)
    boxes = annotations.boxes[rows].astype(np.float64).reshape(-1, 4)
    codes = [{"size": [height, width], "counts": _code(annotations, row, (height, width))} for row in rows.tolist()]
    truth = draw_objects(
        *(small, boxes * factor, np.asarray(annotations.labels)[rows], _masks(codes, size), names), scale=scale
    )
    corners = np.array([_corners(row) for row in found], np.float64).reshape(-1, 4)
    drawn = draw_objects(
        *(small, corners * factor, np.array([labels[row["category_id"]] for row in found], np.int64)),
        *(_masks([row.get("segmentation") for row in found], size), names),
        scores=[row["score"] for row in found],
        scale=scale,
    )
    return data_uri(jpeg(truth), "image/jpeg"), data_uri(jpeg(drawn), "image/jpeg")


def _annotated(annotations: Annotations, image: int) -> NDArray[np.int64]:
    rows = np.arange(*annotations.first_annotation[image : image + 2].tolist())
    rows = rows[~(annotations.crowd[rows] | annotations.ignored[rows])]
    return rows[np.argsort(-np.asarray(annotations.areas)[rows], kind="stable")][:MOST_OBJECTS]


def _code(annotations: Annotations, row: int, image_hw: tuple[int, int]) -> str:
    return run_lengths(annotations.segmentation(row), image_hw)


def _masks(codes: Sequence[dict[str, Any] | None], size: tuple[int, int]) -> NDArray[np.bool_]:
    """(N, height, width) of the size (width, height), one after the other; empty where there is no code."""
    masks = np.zeros((len(codes), size[1], size[0]), np.bool_)
    for mask, code in zip(masks, codes, strict=True):
        if code is not None:
            whole = np.ascontiguousarray(rle.decode(code))
            mask[:] = cv2.resize(whole, size, interpolation=cv2.INTER_NEAREST) > 0
    return masks


def _corners(row: Mapping[str, Any]) -> tuple[float, float, float, float]:
    x, y, width, height = row["bbox"] if "bbox" in row else rle.to_bbox(row["segmentation"])
    return x, y, x + width, y + height
