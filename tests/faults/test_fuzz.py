"""Damaged files of every kind that we read: a sentence or a value, never another exception, at once."""

import json
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_tools import damaged, times
from foreign_files import coco_set, picture
from PIL import Image

from tailseg.data.annotations.annotations import load_annotations
from tailseg.data.images import read_image
from tailseg.data.importers.coco import read_coco
from tailseg.data.importers.cvat import read_cvat
from tailseg.data.importers.labelme import read_labelme
from tailseg.data.importers.voc import read_voc
from tailseg.data.importers.yolo import read_yolo
from tailseg.data.sources import open_data
from tailseg.errors import UserError
from tailseg.evaluation.metrics import score
from tailseg.recipes.resolve import resolve
from tailseg.recipes.values import to_yaml

LONGEST = 5.0  # seconds that a small file may take
CODE = {"size": [40, 80], "counts": [805, 10, 2385]}


def coco(folder: Path) -> Path:
    path = coco_set(folder, "val.json", "images", range(3)) / "val.json"
    content = json.loads(path.read_text())
    content["annotations"][1]["segmentation"] = CODE
    content["images"][0]["neg_category_ids"] = [17]
    path.write_text(json.dumps(content))
    return path


def results(folder: Path) -> Path:
    coco(folder)
    row = {"category_id": 17, "score": 0.5, "bbox": [20, 5, 40, 20], "segmentation": CODE}
    (folder / "found.json").write_text(json.dumps([{"image_id": i, **row} for i in (0, 2)]))
    return folder / "found.json"


def labelme(folder: Path) -> Path:
    picture(folder / "a.jpg")
    shape = {"label": "cat", "points": [[20, 10], [60, 10], [20, 30]], "shape_type": "polygon", "group_id": None}
    box = {"label": "owl", "points": [[20, 10], [60, 30]], "shape_type": "rectangle", "group_id": 1}
    content = {"version": "5", "shapes": [shape, box], "imagePath": "a.jpg", "imageHeight": 40, "imageWidth": 80}
    (folder / "a.json").write_text(json.dumps(content))
    return folder / "a.json"


def voc(folder: Path) -> Path:
    picture(folder / "a.jpg")
    box = "<xmin>21</xmin><ymin>11</ymin><xmax>60</xmax><ymax>30</ymax>"
    size = "<size><width>80</width><height>40</height></size>"
    item = f"<object><name>cat</name><bndbox>{box}</bndbox></object>"
    (folder / "a.xml").write_text(f"<annotation><filename>a.jpg</filename>{size}{item}</annotation>")
    return folder / "a.xml"


def cvat(folder: Path) -> Path:
    picture(folder / "images" / "a.jpg")
    shapes = '<polygon label="cat" points="20,10;60,10;20,30"/>'
    shapes += '<mask label="cat" rle="3, 5" left="1" top="1" width="4" height="2"/>'
    image = f'<image id="0" name="a.jpg" width="80" height="40">{shapes}</image>'
    (folder / "annotations.xml").write_text(f"<annotations><version>1.1</version>{image}</annotations>")
    return folder / "annotations.xml"


def yolo_labels(folder: Path) -> Path:
    picture(folder / "images" / "a.jpg")
    (folder / "labels").mkdir()
    (folder / "data.yaml").write_text("train: images\nnames: [cat, owl]\n")
    (folder / "labels" / "a.txt").write_text("0 0.25 0.25 0.75 0.25 0.25 0.75\n1 0.5 0.5 0.25 0.25\n")
    return folder / "labels" / "a.txt"


def yolo_config(folder: Path) -> Path:
    yolo_labels(folder)
    text = "path: .\ntrain: [images]\nval: images\nnc: 2\nnames:\n  0: cat\n  1: owl\n"
    (folder / "data.yaml").write_text(text)
    return folder / "data.yaml"


def data_yaml(folder: Path) -> Path:
    coco(folder)
    (folder / "set.yaml").write_text("train: val.json\nval: val.json\nimages: images\n")
    return folder / "set.yaml"


def recipe(folder: Path) -> Path:
    (folder / "recipe.yaml").write_text(to_yaml(resolve("demo/seesaw")))
    return folder / "recipe.yaml"


def image(suffix: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        pixels = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"a{suffix}")
        return folder / f"a{suffix}"

    return make


KINDS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any]]] = {
    "annotations": (coco, lambda path: load_annotations(path, path.parent)),
    "annotations with errors": (coco, lambda path: load_annotations(path, path.parent, tolerant=True)),
    "COCO import": (coco, read_coco),
    "results": (results, lambda path: score(path.parent / "val.json", path)),
    "labelme": (labelme, lambda path: read_labelme(path.parent)),
    "VOC": (voc, lambda path: read_voc(path.parent)),
    "CVAT": (cvat, read_cvat),
    "YOLO labels": (yolo_labels, lambda path: read_yolo(path.parents[1])),
    "YOLO data.yaml": (yolo_config, read_yolo),
    "data YAML": (data_yaml, open_data),
    "recipe": (recipe, lambda path: resolve(str(path))),
    **{f"image {suffix}": (image(suffix), read_image) for suffix in (".jpg", ".png", ".tif", ".gif", ".webp", ".bmp")},
}


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAILSEG_CACHE", str(tmp_path / "cache"))
    make, use = KINDS[kind]
    (tmp_path / "set").mkdir()
    path = make(tmp_path / "set")
    sound = path.read_bytes()
    use(path)
    rng = random.Random(kind)
    for _ in range(times(25, 6000)):
        content, faults = sound, []
        for _ in range(rng.choice((1, 1, 2, 5))):
            what, content = damaged(content or b"x", rng)
            faults.append(what)
        check(path, content, use, faults)


@pytest.mark.parametrize("kind", ["annotations", "annotations with errors", "COCO import", "results", "labelme"])
def test_other_values_in_json(tmp_path: Path, kind: str) -> None:
    make, use = KINDS[kind]
    path = make(tmp_path)
    sound = json.loads(path.read_bytes())
    rng = random.Random(kind)
    for _ in range(times(50, 6000)):
        changed = json.loads(json.dumps(sound))
        faults = [exchange(changed, rng) for _ in range(rng.choice((1, 1, 2, 5)))]
        check(path, json.dumps(changed).encode(), use, faults)


def check(path: Path, content: bytes, use: Callable[[Path], Any], faults: list[str]) -> None:
    """Use the file with this content: nothing but a UserError may come of it, and soon."""
    path.write_bytes(content)
    started = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's on broken files
            use(path)
    except UserError as error:
        sentence = str(error)
    except Exception as error:
        raise AssertionError(f"{faults}: {type(error).__name__}: {error}; {content[:2000]!r}") from error
    else:
        sentence = ""
    assert "\n" not in sentence, (faults, sentence)
    assert time.perf_counter() - started < LONGEST, faults


VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 0.5, -0.0, 1e308, -1e308, 2**31, 2**53 + 1, 2**63, 2**64 - 1, -(2**63), 10**30),
    *("", "a", "0", "nan", "../x", "\\", "\0", "\ud800", "\u202e", "x" * 300, "/etc/passwd"),
    *([], [[]], [1, 2], [1] * 7, [[1, 2, 3, 4, 5, 6]], [None], [[None] * 6], [{"a": 1}], {}, {"size": [40, 80]}),
    *({"counts": "0", "size": [40, 80]}, {"counts": [3200], "size": [40, 80]}, {"counts": [], "size": [65535, 65535]}),
]


def exchange(content: Any, rng: random.Random) -> str:
    """Put another value somewhere into JSON content, or take one out; says what was done."""
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            places.append((value, key))
            walk(inner)

    walk(content)
    if not places:
        return "nothing"
    parent, key = rng.choice(places)
    if rng.random() < 0.2:
        del parent[key]
        return f"{key!r} taken out"
    parent[key] = json.loads(json.dumps(rng.choice(VALUES)))
    return f"{key!r} is {str(parent[key])[:40]!r}"
