"""Pictures of the rarest classes of a data set."""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
from hotcoco import mask as rle
from numpy.typing import NDArray

from tailseg.data.annotations.annotations import Annotations
from tailseg.data.diagnosis.dataset_report import ClassRow, DatasetReport
from tailseg.data.diagnosis.mask_checks import image_of_rows
from tailseg.data.images import read_image
from tailseg.errors import UserError
from tailseg.visualize.colours import PALETTE

CLASSES_SHOWN, CROPS = 24, 3  # classes, and pictures of each
CROP_SIDE, MARGIN = 220, 0.35  # pixels of a picture's longer side; surroundings shown, in sides of the box


def rarest_classes(report: DatasetReport, train: Annotations) -> Iterator[tuple[ClassRow, list[bytes]]]:
    """The rarest classes that have objects, the rarest first, each with its largest objects outlined.

    Yields:
        Up to 24 classes with up to three JPEG files each; images that cannot be read are left out.
    """
    rows = sorted((row for row in report.classes if row.train_instances), key=lambda row: (row.train_images, row.id))
    labels = {category.id: label for label, category in enumerate(train.categories)}
    images = image_of_rows(train)
    real = np.asarray(train.trained)
    for row in rows[:CLASSES_SHOWN]:
        found = np.flatnonzero((np.asarray(train.labels) == labels[row.id]) & real)
        pictures = [crop(train, int(images[number]), int(number)) for number in _largest(train, found).tolist()]
        yield row, [jpeg(picture) for picture in pictures if picture is not None]


def _largest(train: Annotations, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    return rows[np.argsort(-np.asarray(train.areas)[rows], kind="stable")][:CROPS]


def crop(train: Annotations, image: int, row: int) -> NDArray[np.uint8] | None:
    """The surroundings of annotation ``row`` with its outline; None if the image cannot be read."""
    try:
        pixels = read_image(train.image_path(image))
    except UserError:
        return None
    height, width = pixels.shape[:2]
    x0, y0, x1, y1 = train.boxes[row].astype(np.float64).tolist()
    margin = MARGIN * max(x1 - x0, y1 - y0, 8)
    left, top = int(max(x0 - margin, 0)), int(max(y0 - margin, 0))
    right, bottom = int(min(x1 + margin, width)) + 1, int(min(y1 + margin, height)) + 1
    cut = pixels[top:bottom, left:right]
    if cut.size == 0:
        return None
    factor = CROP_SIDE / max(cut.shape[:2])
    size = (max(1, round(cut.shape[1] * factor)), max(1, round(cut.shape[0] * factor)))
    picture = cv2.resize(cut, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR)
    outlines = [((p - (left, top)) * factor).round().astype(np.int32) for p in _outlines(train, image, row)]
    for colour, thickness in (((0, 0, 0), 4), (PALETTE[3], 2)):
        cv2.polylines(picture, outlines, isClosed=True, color=colour, thickness=thickness, lineType=cv2.LINE_AA)
    return np.asarray(picture, np.uint8)


def _outlines(train: Annotations, image: int, row: int) -> list[NDArray[np.float64]]:
    """Closed lines (K, 2) of a mask, in pixels of the image."""
    segmentation = train.segmentation(row)
    if not isinstance(segmentation, bytes):
        return [polygon.astype(np.float64).reshape(-1, 2) for polygon in segmentation]
    bitmap = rle.decode({"size": train.image_sizes[image].tolist(), "counts": segmentation})
    found, _ = cv2.findContours(np.ascontiguousarray(bitmap), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return [line.reshape(-1, 2).astype(np.float64) + 0.5 for line in found]


def jpeg(picture: NDArray[np.uint8]) -> bytes:
    """The JPEG file of a picture (H, W, 3) RGB."""
    _, code = cv2.imencode(".jpg", picture[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 82])
    return bytes(code.tobytes())
