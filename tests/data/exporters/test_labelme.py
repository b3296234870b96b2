import json

import numpy as np
import pytest
from export_sets import an_object, assert_same_objects, code_of, exported, plans, written
from hypothesis import given

from tailseg.data.importers.labelme import read_labelme

HW = (10, 20)
SQUARE = np.array([2.0, 1, 12, 1, 12, 6.25, 2, 6.25])


@given(plan=plans())
def test_out_and_in_again(plan, tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelme")
    trip = written(plan, folder / "in")
    exported("labelme", trip, folder / "out")
    assert_same_objects(trip, read_labelme(folder / "out"))


@pytest.mark.parametrize("split", ["train", ""])
def test_the_files(split, tmp_path):
    pieces = np.zeros(HW)
    pieces[1:3, 1:3] = pieces[1:3, 6:9] = 1
    objects = [
        an_object(0, [SQUARE], HW, score=0.75),
        an_object(3, code_of(pieces), HW),
        an_object(1, [SQUARE, SQUARE + 5], HW),
        an_object(1, code_of(np.zeros(HW)), HW),
        an_object(1, [SQUARE], HW, crowd=True),
    ]
    trip = written({split: [{"name": "sub/a b.png", "image_hw": HW, "objects": objects}]}, tmp_path / "in")
    done = exported("labelme", trip, tmp_path / "out")
    assert done.objects == {split: 3}
    assert done.notes[:2] == [
        "1 crowds left out: the format has no mark for them (sub/a b.png)",
        "1 objects without a mask left out (sub/a b.png)",
    ]
    base = tmp_path / "out" / split / "sub"
    assert (base / "a b.png").is_file()
    content = json.loads((base / "a b.json").read_text())
    shapes = content.pop("shapes")
    assert content == {
        **{"version": "5.5.0", "flags": {}, "imagePath": "a b.png", "imageData": None},
        **{"imageHeight": 10, "imageWidth": 20},
    }
    assert shapes[0] == {
        **{"label": "yes", "shape_type": "polygon", "flags": {}, "group_id": None, "description": "", "score": 0.75},
        "points": [[2, 1], [12, 1], [12, 6.25], [2, 6.25]],
    }
    assert [(shape["label"], shape["group_id"]) for shape in shapes[1:]] == [
        *[("1", 1)] * 2,
        *[("a & <b> 'c': #1", 2)] * 2,
    ]
    assert shapes[1]["points"] == [[1, 1], [3, 1], [3, 3], [1, 3]]


def test_an_image_without_objects_has_a_file(tmp_path):
    trip = written({"": [{"name": "a.png", "image_hw": HW, "objects": []}]}, tmp_path / "in")
    exported("labelme", trip, tmp_path / "out")
    assert json.loads((tmp_path / "out/a.json").read_text())["shapes"] == []
