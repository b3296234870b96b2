"""Write a generated annotation file of LVIS v1 train's size: 100,170 images, 1,270,141 masks, 1,203 classes, 1.1 GB.

    python benchmarks/lvis_size.py train.json               # half a minute
    python benchmarks/lvis_size.py small.json --scale 0.1   # a tenth of the images and of each class

Images and instances of each class are those of the real file (``shared/data/lvis_v1_categories.csv`` beside the
project), and so are the spread of polygon lengths and the layout of the JSON. Shapes are stars around a point, taken
from a pool of some thousands; annotations stand in random order.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CATEGORIES = Path(__file__).resolve().parents[2] / "shared" / "data" / "lvis_v1_categories.csv"
IMAGES = 100_170
SIDES = ((480, 640), (640, 480))  # height and width; objects stay within 480 x 480
POOL = 20_000
CHUNK = 20_000  # rows that are written at once
MEAN_COORDINATES = 94.0  # of an annotation, over its polygons: makes the whole file 1.1 GB


def categories(scale: float) -> list[dict[str, Any]]:
    """The real classes, their images and instances scaled down to no less than one."""
    with CATEGORIES.open(newline="") as file:
        rows = list(csv.DictReader(file))
    made = []
    for row in rows:
        images = max(1, round(int(row["image_count"]) * scale))
        instances = max(images, round(int(row["instance_count"]) * scale))
        about = {"id": int(row["id"]), "name": row["name"], "synset": f"{row['name']}.n.01"}
        about |= {"synonyms": [row["name"]], "def": f"what is called {row['name']}", "frequency": row["frequency"]}
        made.append(about | {"image_count": images, "instance_count": instances})
    return made


def shapes(rng: np.random.Generator) -> list[str]:
    """The pool: the part of an annotation's JSON from its area to its box."""
    made = []
    counts = np.exp(rng.normal(0, 0.9, POOL))
    counts = np.maximum(3, counts * (MEAN_COORDINATES / 2 / counts.mean())).astype(int)
    pieces = 1 + rng.geometric(0.75, POOL) - 1  # polygons of an object: mostly one
    for points, polygons in zip(counts.tolist(), pieces.tolist(), strict=True):
        parts = []
        low, high = np.full(2, np.inf), np.full(2, -np.inf)
        area = 0.0
        for _ in range(polygons):
            corners = max(3, points // polygons)
            radius = np.exp(rng.uniform(np.log(4), np.log(110))) * rng.uniform(0.6, 1.0, corners)
            angle = np.sort(rng.uniform(0, 2 * np.pi, corners))
            centre = rng.uniform(120, 360, 2)
            xy = np.round(centre + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1), 2)
            low, high = np.minimum(low, xy.min(axis=0)), np.maximum(high, xy.max(axis=0))
            x, y = xy.T
            area += abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2
            parts.append(xy.ravel().tolist())
        width, height = np.maximum(high - low, 1).round(2).tolist()
        box = [*low.round(2).tolist(), width, height]
        made.append(f'"area": {area + 1:.2f}, "segmentation": {json.dumps(parts)}, "bbox": {json.dumps(box)}')
    return made


def places(classes: list[dict[str, Any]], images: int, rng: np.random.Generator) -> tuple[NDArray[Any], NDArray[Any]]:
    """Image (position) and category id of each annotation, in random order."""
    of_images, of_classes = [], []
    for row in classes:
        chosen = rng.choice(images, min(row["image_count"], images), replace=False)
        more = rng.choice(chosen, row["instance_count"] - len(chosen))
        of_images += [chosen, more]
        of_classes.append(np.full(len(chosen) + len(more), row["id"]))
    order = rng.permutation(sum(map(len, of_classes)))
    return np.concatenate(of_images)[order], np.concatenate(of_classes)[order]


def write(path: Path, scale: float = 1.0, seed: int = 0) -> None:
    """Write the file."""
    rng = np.random.default_rng(seed)
    classes = categories(scale)
    images = max(1, round(IMAGES * scale))
    of_images, of_classes = places(classes, images, rng)
    pool = shapes(rng)
    drawn = rng.integers(0, POOL, len(of_images))
    with path.open("w", encoding="utf-8", buffering=1 << 22) as file:
        file.write('{"info": {"description": "generated", "version": "1"}, "annotations": [')
        for start in range(0, len(of_images), CHUNK):
            part = slice(start, start + CHUNK)
            columns = zip(of_images[part].tolist(), of_classes[part].tolist(), drawn[part].tolist(), strict=True)
            rows = [
                f'{{{pool[shape]}, "id": {number}, "image_id": {image + 1}, "category_id": {category}}}'
                for number, (image, category, shape) in enumerate(columns, start + 1)
            ]
            file.write((", " if start else "") + ", ".join(rows))
        file.write('], "images": [')
        for start in range(0, images, CHUNK):
            stop = min(start + CHUNK, images)
            file.write((", " if start else "") + ", ".join(_image_rows(start, stop, rng)))
        file.write(f'], "licenses": [], "categories": {json.dumps(classes)}}}')


def _image_rows(start: int, stop: int, rng: np.random.Generator) -> list[str]:
    absent = rng.integers(1, 1204, (stop - start, 8)).tolist()
    partly = rng.integers(1, 1204, (stop - start, 2)).tolist()
    rows = []
    for i in range(start, stop):
        height, width = SIDES[i % 4 == 0]
        place = f"train2017/{i + 1:012}.jpg"
        rows.append(
            f'{{"date_captured": "2013-11-15 02:41:42", "id": {i + 1}, "license": 4, "height": {height}, '
            f'"width": {width}, "flickr_url": "http://farm.example/{i + 1}_z.jpg", '
            f'"coco_url": "http://images.cocodataset.org/{place}", '
            f'"neg_category_ids": {absent[i - start]}, "not_exhaustive_category_ids": {partly[i - start][: i % 3]}}}'
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--scale", type=float, default=1.0)
    options = parser.parse_args()
    write(options.path, options.scale)
    print(f"wrote {options.path}: {options.path.stat().st_size / 1e9:.3f} GB")


if __name__ == "__main__":
    main()
