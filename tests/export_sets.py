"""Random sets for tests of the exporters, and what comes of them when the importers read them again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco

from tailseg.data.annotations.annotations import Category
from tailseg.data.annotations.masks import Segmentation
from tailseg.data.exporters.export import Exported, export
from tailseg.data.exporters.records import ExportImage, ExportObject, ExportSet
from tailseg.data.importers.foreign import Source

CATEGORIES = tuple(
    Category(number, name, "f", 1, 1)
    for number, name in ((3, "yes"), (4, "a & <b> 'c': #1"), (9, "Übergröße 深"), (40, "1"))
)
NAMES = (
    *("a.png", "A.png", "a.jpg", "sub/a.png", "sub dir/é ö.png", "images/a.png", "x/images/b.png", "a.b.png"),
    *(".hid.png", "q<&>'.png", "深/x  y.png", "train/val.png", "a-2.png"),
)
Found = Counter[tuple[str, bytes]]  # class and pixels of the objects of one image


def mask_of(segmentation: Segmentation, image_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """(H, W), by COCO's own tools."""
    if isinstance(segmentation, bytes):
        return coco.decode({"size": list(image_hw), "counts": segmentation})
    polygons = [polygon.tolist() for polygon in segmentation]
    return coco.decode(coco.frPyObjects(polygons, *image_hw)).max(axis=2)


def code_of(pixels: NDArray[Any]) -> bytes:
    return coco.encode(np.asfortranarray(pixels.astype(np.uint8)))["counts"]


def box_of(segmentation: Segmentation, image_hw: tuple[int, int]) -> tuple[float, float, float, float]:
    """x, y, width, height within the image."""
    if isinstance(segmentation, bytes):
        x, y, w, h = coco.toBbox({"size": list(image_hw), "counts": segmentation}).tolist()
        return x, y, w, h
    points = np.concatenate([p.reshape(-1, 2) for p in segmentation]).clip(0, image_hw[::-1])
    (x0, y0), (x1, y1) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    return x0, y0, x1 - x0, y1 - y0


def an_object(label: int, segmentation: Segmentation, image_hw: tuple[int, int], **changes: Any) -> ExportObject:
    area = float(mask_of(segmentation, image_hw).sum())
    return ExportObject(label, box_of(segmentation, image_hw), segmentation, area, **changes)


@st.composite
def polygons(draw: st.DrawFn, image_hw: tuple[int, int], beyond: float = 0.0) -> NDArray[np.float64]:
    """A polygon with an extent in the image, of any number of decimals."""
    height, width = image_hw
    decimals = draw(st.sampled_from([0, 1, 2, 3, 9]))
    share = st.floats(-beyond, 1 + beyond)
    corners = draw(st.lists(st.tuples(share, share), min_size=3, max_size=7))
    points = np.round(np.array(corners) * (width, height), decimals)
    points[0], points[1] = (0.25 * width, 0.25 * height), (0.75 * width, 0.5 * height)
    return points.ravel()


@st.composite
def rles(draw: st.DrawFn, image_hw: tuple[int, int]) -> bytes:
    seed, share = draw(st.integers(0, 2**32)), draw(st.sampled_from([0.2, 0.5, 0.9]))
    pixels = np.random.default_rng(seed).random(image_hw) < share
    pixels[draw(st.integers(0, image_hw[0] - 1)), draw(st.integers(0, image_hw[1] - 1))] = True
    return code_of(pixels)


@st.composite
def segmentations(draw: st.DrawFn, image_hw: tuple[int, int]) -> Segmentation:
    """Polygons or an RLE of at least one pixel."""
    found = draw(_segmentations(image_hw).filter(lambda found: mask_of(found, image_hw).any()))
    assert isinstance(found, bytes | list)
    return found


@st.composite
def _segmentations(draw: st.DrawFn, image_hw: tuple[int, int]) -> Segmentation:
    kind = draw(st.sampled_from(["one", "one", "beyond", "several", "rle"]))
    if kind == "rle":
        return draw(rles(image_hw))
    if kind == "several":
        return draw(st.lists(polygons(image_hw), min_size=2, max_size=3))
    return [draw(polygons(image_hw, beyond=0.3 if kind == "beyond" else 0.0))]


@st.composite
def plans(draw: st.DrawFn) -> dict[str, list[dict[str, Any]]]:
    """For each split, images as names, sizes and objects; at least one object in training."""
    plan: dict[str, list[dict[str, Any]]] = {}
    for split in ("train", "val"):
        names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True))
        plan[split] = []
        for name in names:
            image_hw = draw(st.tuples(st.integers(2, 30), st.integers(2, 30)))
            several = st.lists(segmentations(image_hw), max_size=3)
            objects = [
                an_object(draw(st.integers(0, 3)), one, image_hw, crowd=draw(st.sampled_from([False, False, True])))
                for one in draw(several)
            ]
            plan[split].append({"name": name, "image_hw": image_hw, "objects": objects})
    first = plan["train"][0]
    first["objects"].append(an_object(1, [np.array([0.0, 0, 2, 0, 2, 2])], first["image_hw"]))
    return plan


@dataclass(frozen=True)
class Trip:
    """A set on its way out: a record for the exporters, and the objects that each image's bytes stand for."""

    data: ExportSet
    content: dict[bytes, ExportImage]


def written(plan: dict[str, list[dict[str, Any]]], root: Path) -> Trip:
    """The images of a plan as files, no two alike, and the record."""
    splits: dict[str, Iterable[ExportImage]] = {}
    content: dict[bytes, ExportImage] = {}
    number = annotation = 0
    for split, images in plan.items():
        records = []
        for image in images:
            number += 1
            path = root / split / image["name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            height, width = image["image_hw"]
            Image.new("RGB", (width, height), (number, 7, 7)).save(path, "PNG")
            records.append(ExportImage(path=path, id=1000 + number, **image))
            annotation += len(image["objects"])
            content[path.read_bytes()] = records[-1]
        splits[split] = records
    assert len(content) == number
    return Trip(ExportSet("the set", CATEGORIES, splits), content)


def exported(kind: str, trip: Trip, out: Path) -> Exported:
    done = export(kind, trip.data, out)
    assert {split: len(list(images)) for split, images in trip.data.splits.items()} == done.images
    return done


def expected(image: ExportImage, *, crowds: bool = False) -> Found:
    """Classes and pixels of an image's objects."""
    kept = [item for item in image.objects if crowds or not item.crowd]
    pixels = (mask_of(item.segmentation, image.image_hw).tobytes() for item in kept)
    return Counter((CATEGORIES[item.label].name, mask) for item, mask in zip(kept, pixels, strict=True))


def read_again(source: Source) -> dict[str, dict[bytes, list[dict[str, Any]]]]:
    """What an importer made: for each split, the objects of each image, which is named by its bytes."""
    names = {row["id"]: row["name"] for row in source.categories}
    found: dict[str, dict[bytes, list[dict[str, Any]]]] = {}
    for split, part in source.parts.items():
        found[split] = {}
        for row, file in zip(part.images, part.files, strict=True):
            image_hw = (row["height"], row["width"])
            objects = [
                {**item, "name": names[item["category_id"]], "pixels": pixels_of(item["segmentation"], image_hw)}
                for item in part.annotations
                if item["image_id"] == row["id"]
            ]
            key = file.read_bytes() if isinstance(file, Path) else file()
            assert key not in found[split]
            found[split][key] = objects
    return found


def pixels_of(segmentation: Any, image_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """(H, W) of a segmentation in a JSON file, by COCO's own tools."""
    if isinstance(segmentation, list):
        return mask_of([np.array(polygon) for polygon in segmentation], image_hw)
    return coco.decode(segmentation)


def assert_same_objects(trip: Trip, source: Source, *, crowds: bool = False) -> None:
    """Every image in its split, with the same classes, pixels and boxes."""
    again = read_again(source)
    for split, images in trip.data.splits.items():
        assert len(again[split]) == len(list(images))
        for key, objects in again[split].items():
            image = trip.content[key]
            assert image in images
            found = Counter((item["name"], item["pixels"].tobytes()) for item in objects)
            assert found == expected(image, crowds=crowds)
            kept = [item for item in image.objects if crowds or not item.crowd]
            for item, ours in zip(objects, kept, strict=True):
                pixels = mask_of(ours.segmentation, image.image_hw)
                boxes = (
                    ours.box,
                    box_of(code_of(pixels), image.image_hw),
                )  # of the polygon as annotated, of an outline
                assert any(np.allclose(item["bbox"], box, rtol=0, atol=0.002) for box in boxes)
                assert item["area"] == pixels.sum()
