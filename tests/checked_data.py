"""Small data sets for the checks of `tailseg data check`, and what they find."""

import json

import numpy as np
from PIL import Image

from tailseg.data.diagnosis.dataset_report import check_data
from tailseg.data.sources import open_data
from tailseg.recipes.resolve import resolve

RECIPE = resolve("table1/seesaw", ())
WIDTH, HEIGHT = 60, 40


def polygon_of(box):
    x, y, w, h = box
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def row(number, image, box=(10, 10, 20, 15), category=1, **changes):
    base = {"id": number, "image_id": image, "category_id": category, "bbox": list(box), "area": box[2] * box[3]}
    return base | {"segmentation": [polygon_of(box)], "iscrowd": 0} | changes


def write(folder, train, val=(), names=("cat", "owl"), sizes=None):
    """A data set: rows of both splits; training images 1 to 4, validation images 11 and 12."""
    categories = [{"id": i, "name": name} for i, name in enumerate(names, start=1)]
    for split, rows, ids in (("train", train, range(1, 5)), ("val", val, (11, 12))):
        images = []
        for i in ids:
            width, height = (sizes or {}).get(i, (WIDTH, HEIGHT))
            path = folder / "images" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(i).integers(0, 255, (height, width, 3), np.uint8)
            Image.fromarray(noise).save(path)
            images.append({"id": i, "file_name": path.name, "height": height, "width": width})
        content = {"images": images, "annotations": list(rows), "categories": categories}
        (folder / f"{split}.json").write_text(json.dumps(content))
    return folder


def report(folder):
    return check_data(str(folder), open_data(str(folder), show=False, examine=True), RECIPE)


def finding(found, text, split=None):
    """The one finding whose text holds ``text``."""
    matching = [f for f in found.findings if text in f.what and split in (None, f.split)]
    assert len(matching) == 1, [f.what for f in found.findings]
    return matching[0]


def texts(found):
    return [f.what for f in found.findings]


SOUND = [row(1, 1), row(2, 2), row(3, 3, category=2), row(4, 4, category=2)]
SOUND_VAL = [row(1, 11), row(2, 12, category=2)]
