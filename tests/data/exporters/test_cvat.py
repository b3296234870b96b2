from collections import Counter
from xml.etree import ElementTree

import numpy as np
import pytest
from export_sets import CATEGORIES, an_object, assert_same_objects, code_of, expected, exported, mask_of, plans, written
from hypothesis import given

from tailseg.data.importers.cvat import read_cvat

HW = (10, 20)
SQUARE = np.array([2.0, 1, 12, 1, 12, 6.25, 2, 6.25])


def points_of(element):
    return np.array([pair.split(",") for pair in element.get("points").split(";")], np.float64).ravel()


def pixels_of(element, image_hw):
    """(H, W), as CVAT reads an element."""
    if element.tag == "polygon":
        return mask_of([points_of(element)], image_hw)
    left, top, width, height = (int(element.get(key)) for key in ("left", "top", "width", "height"))
    runs = [int(run) for run in element.get("rle").split(",")]
    flat = np.repeat(np.arange(len(runs)) % 2, runs)
    full = np.zeros(image_hw, np.uint8)
    full[top : top + height, left : left + width] = flat.reshape(height, width)
    return full


@given(plan=plans())
def test_every_object_is_in_the_file(plan, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cvat")
    trip = written(plan, folder / "in")
    exported("cvat", trip, folder / "out")
    root = ElementTree.parse(folder / "out/annotations.xml").getroot()
    elements = root.findall("image")
    assert [int(element.get("id")) for element in elements] == list(range(len(trip.content)))
    for element in elements:
        split = element.get("subset")
        image = trip.content[(folder / "out/images" / split / element.get("name")).read_bytes()]
        assert image in trip.data.splits[split]
        assert (int(element.get("height")), int(element.get("width"))) == image.image_hw
        objects: dict[object, np.ndarray] = {}
        names = {}
        for number, shape in enumerate(element):
            key = shape.get("group_id") or -number
            objects[key] = objects.get(key, 0) | pixels_of(shape, image.image_hw)
            names[key] = shape.get("label")
        assert Counter((names[key], objects[key].tobytes()) for key in objects) == expected(image)


@given(plan=plans())
def test_out_and_in_again(plan, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cvat")
    trip = written(plan, folder / "in")
    exported("cvat", trip, folder / "out")
    assert_same_objects(trip, read_cvat(folder / "out"))


@pytest.mark.parametrize("split", ["train", ""])
def test_the_file(split, tmp_path):
    ring = np.zeros(HW)
    ring[2:5, 3:7] = 1
    ring[3, 4] = 0
    objects = [
        an_object(1, [SQUARE], HW, score=0.5),
        an_object(2, code_of(ring), HW),
        an_object(0, [SQUARE, SQUARE + 5], HW),
        an_object(0, [SQUARE, SQUARE + 6], HW),
        an_object(0, code_of(np.zeros(HW)), HW),
    ]
    trip = written({split: [{"name": "a b.png", "image_hw": HW, "objects": objects}]}, tmp_path / "in")
    done = exported("cvat", trip, tmp_path / "out")
    assert (done.objects, done.notes[0]) == ({split: 4}, "1 objects without a mask left out (a b.png)")
    assert (tmp_path / "out/images" / split / "a b.png").is_file()
    root = ElementTree.parse(tmp_path / "out/annotations.xml").getroot()
    assert (root.tag, root.findtext("version")) == ("annotations", "1.1")
    assert [label.findtext("name") for label in root.findall("meta/task/labels/label")] == [
        category.name for category in CATEGORIES
    ]
    (image,) = root.findall("image")
    about = {"id": "0", "name": "a b.png", "width": "20", "height": "10"}
    assert image.attrib == (about | {"subset": split} if split else about)
    common = {"source": "auto", "occluded": "0", "z_order": "0"}
    assert image[0].attrib == common | {"label": "a & <b> 'c': #1", "points": "2,1;12,1;12,6.25;2,6.25"}
    assert image[1].tag == "mask"
    assert image[1].attrib == common | {
        **{"label": "Übergröße 深", "left": "3", "top": "2", "width": "4", "height": "3"},
        "rle": "0, 5, 1, 6",
    }
    assert [shape.get("group_id") for shape in image[2:]] == ["1", "1", "2", "2"]
