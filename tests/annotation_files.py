"""Annotation files of two small images, for tests of what reads them."""

import json

import pytest

from tailseg.data.annotations.annotations import load_annotations
from tailseg.errors import UserError

SQUARE = [10, 10, 30, 10, 30, 30, 10, 30]


def annotation(number, image_id=1, category_id=2, **changes):
    row = {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [10, 10, 20, 20],
        "area": 400,
    }
    return row | {"iscrowd": 0, "segmentation": [SQUARE]} | changes


def content(annotations=None, **changes):
    """Two images of 40 x 50 pixels, three categories out of order."""
    images = [{"id": i, "height": 40, "width": 50, "file_name": f"{i}.jpg"} for i in (5, 1)]
    categories = [{"id": 9, "name": "owl"}, {"id": 2, "name": "cat"}, {"id": 4, "name": "dog"}]
    rows = [annotation(1), annotation(2, 5, 9)] if annotations is None else annotations
    return {"images": images, "annotations": rows, "categories": categories} | changes


def load(folder, data=None, **options):
    path = folder / "train.json"
    text = data if isinstance(data, str | bytes) else json.dumps(content() if data is None else data)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_annotations(path, folder / "images", **options)


def fault(folder, data):
    with pytest.raises(UserError) as caught:
        load(folder, data)
    message = str(caught.value)
    assert message.startswith(f"{folder / 'train.json'}: ")
    assert "\n" not in message
    return message
