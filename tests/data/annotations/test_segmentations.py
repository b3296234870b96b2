import numpy as np
import pytest
from annotation_files import SQUARE, annotation, content, fault, load
from pycocotools import mask as coco

from tailseg.errors import UserError


@pytest.mark.parametrize(("number", "kind"), [(12.34, np.float32), (12.345, np.float64), (1 / 3, np.float64)])
def test_coordinates_come_back_to_the_last_digit(tmp_path, number, kind):
    polygons = [[number, 1.1, 30.3, 2.2, 7.7, 33.33]]
    data = load(tmp_path, content([annotation(1), annotation(2, segmentation=polygons)]))
    assert data.segmentations.coordinates.dtype == kind
    assert [polygon.tolist() for polygon in data.segmentation(1)] == polygons


def test_polygons_and_both_kinds_of_rle(tmp_path):
    bitmap = np.asfortranarray(np.zeros((40, 50), np.uint8))
    bitmap[3:9, 4:20] = 1
    code = coco.encode(bitmap)["counts"]
    runs = [163] + [6, 34] * 15 + [6, 2000 - 163 - 40 * 15 - 6]
    rows = [
        annotation(1, segmentation=[SQUARE, [1, 2, 3, 4.25, 5, 6]]),
        annotation(2, segmentation={"size": [40, 50], "counts": code.decode()}),
        annotation(3, segmentation={"size": [40, 50], "counts": runs}),
        annotation(4, segmentation=[SQUARE]),
    ]
    data = load(tmp_path, content(rows))
    assert [p.tolist() for p in data.segmentation(0)] == [SQUARE, [1, 2, 3, 4.25, 5, 6]]
    assert data.segmentation(1) == data.segmentation(2) == code
    assert [p.tolist() for p in data.segmentation(3)] == [SQUARE]


BAD = {
    "two points": (
        content([annotation(3, segmentation=[[1, 2, 3, 4]])]),
        "annotation 3: a polygon has 4 coord",
    ),
    "odd": (
        content([annotation(3, segmentation=[SQUARE, [1, 2, 3, 4, 5, 6, 7]])]),
        "a polygon has 7 coordinates",
    ),
    "no polygon": (content([annotation(3, segmentation=[])]), "annotation 3: segmentation is empty"),
    "empty polygon": (
        content([annotation(3, segmentation=[[]])]),
        "annotation 3: a polygon has 0 coordinates",
    ),
    "flat": (
        content([annotation(3, segmentation=SQUARE)]),
        "annotation 3: a polygon is 10; it must be a flat",
    ),
    "points": (
        content([annotation(3, segmentation=[[[1, 2], [3, 4], [5, 6]]])]),
        "annotation 3: a polygon is",
    ),
    "words": (content([annotation(3, segmentation=[["1", 2, 3, 4, 5, 6]])]), "annotation 3: a polygon is"),
    "wild": (
        content([annotation(3, segmentation=[[1e9, 2, 3, 4, 5, 6]])]),
        "annotation 3: a polygon has a coord",
    ),
    "no segmentation": (content([annotation(3, segmentation=None)]), "annotation 3: segmentation is None"),
    "rle sum": (
        content([annotation(3, segmentation={"size": [40, 50], "counts": [1, 2]})]),
        "that sum to 40 x 50",
    ),
    "rle short": (
        content([annotation(3, segmentation={"size": [40, 50], "counts": "02"})]),
        "covers 2 pixels",
    ),
    "rle code": (
        content([annotation(3, segmentation={"size": [40, 50], "counts": "z"})]),
        "not a compressed RLE",
    ),
    "rle none": (content([annotation(3, segmentation={"size": [40, 50]})]), "counts are None"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(tmp_path, name):
    data, expected = BAD[name]
    message = fault(tmp_path, data)
    with pytest.raises(UserError, match=expected):
        raise UserError(message)
