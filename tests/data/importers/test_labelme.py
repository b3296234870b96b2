import json
from pathlib import Path

import numpy as np
import pytest
from foreign_files import attempt, converted, fault, picture
from hypothesis import given
from hypothesis import strategies as st

from tailseg.data.importers.labelme import parse_shape, read_labelme
from tailseg.errors import UserError


def labelme(root: Path, name: str, shapes, **changes) -> Path:
    picture(root / f"{name}.jpg")
    content = {
        "version": "5.4",
        "flags": {},
        "shapes": shapes,
        "imagePath": f"{Path(name).name}.jpg",
        "imageData": None,
    }
    content |= {"imageHeight": 40, "imageWidth": 80} | changes
    (root / f"{name}.json").write_text(json.dumps(content))
    return root


def shape(label="cat", points=((10, 10), (30, 10), (10, 30)), kind="polygon", group=None):
    return {"label": label, "points": [list(p) for p in points], "shape_type": kind, "group_id": group}


def test_labelme_polygons_rectangles_and_groups(tmp_path):
    root = tmp_path / "src"
    pieces = [shape("owl", group=1), shape(kind="rectangle", points=((30, 20), (5, 8))), shape("owl", group=1)]
    labelme(root, "train/a", [*pieces, shape("owl", group=2), shape("cat", group=1)])
    labelme(root, "val/a", [shape()])
    splits, _ = converted("labelme", root, tmp_path)
    assert [c.name for c in splits.train.categories] == ["cat", "owl"]
    assert splits.train.labels.tolist() == [1, 0, 1, 0]
    assert len(splits.train.segmentation(0)) == 2
    assert splits.train.boxes[1].tolist() == [5, 8, 30, 20]
    assert len(splits.val) == 1


@pytest.mark.parametrize(
    ("shapes", "changes", "problem"),
    [
        ([shape(), shape(kind="circle")], {}, "a.json: shape 2: it is a 'circle'"),
        ([shape(points=((1, 2), (3, 4)))], {}, "shape 1: a polygon needs at least 3 points"),
        ([shape(label="")], {}, "shape 1: it has no label"),
        ([{"label": "x", "points": [[1, "2"], [3, 4], [5, 6]]}], {}, "each [x, y]"),
        ([shape()], {"imagePath": "../../private.jpg"}, "leads out of"),
        ([shape()], {"imagePath": "b.jpg"}, "b.jpg does not exist"),
        ([shape()], {"imagePath": None}, "no 'imagePath'"),
        ([shape()], {"imageHeight": 41}, "it says 80 x 41 pixels"),
        ([], {}, "no file in it has an object"),
    ],
)
def test_labelme_faults_name_file_and_shape(tmp_path, shapes, changes, problem):
    picture(tmp_path / "private.jpg")
    assert problem in fault("labelme", labelme(tmp_path / "src", "a", shapes, **changes), tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=8,
)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "label": st.just("cat") | json_values,
            "points": st.lists(st.lists(st.floats(0, 9), min_size=2, max_size=2), max_size=4) | json_values,
            "shape_type": st.sampled_from(["polygon", "rectangle", "line"]) | json_values,
        },
    )
    | json_values
)
def test_labelme_any_shape_is_read_or_refused(value):
    found, refused = attempt(parse_shape, value, "place")
    if found is None:
        assert refused.startswith("place: ")
    else:
        name, polygon = found
        assert isinstance(name, str)
        assert polygon.shape[1] == 2
        assert len(polygon) >= 3
        assert np.isfinite(polygon).all()


def test_a_rectangle_by_hand():
    name, corners = parse_shape(shape(kind="rectangle", points=((30, 20), (5, 8))), "w")
    assert name == "cat"
    assert corners.tolist() == [[5, 8], [30, 8], [30, 20], [5, 20]]
    _, drawn = parse_shape({"label": "x", "points": [[1, 2], [3.5, 4], [5, 6]]}, "w")  # a polygon if it does not say
    assert drawn.tolist() == [[1, 2], [3.5, 4], [5, 6]]


def test_a_folder_without_files(tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path}: there is no labelme file .*; check the folder"):
        read_labelme(tmp_path)


def test_images_in_another_folder_and_with_backslashes(tmp_path):
    labelme(tmp_path, "a", [shape()], imagePath="pictures\\b.jpg")
    picture(tmp_path / "pictures" / "b.jpg")
    found = read_labelme(tmp_path).parts["train"]
    assert found.files == [tmp_path / "pictures" / "b.jpg"]
    assert found.images[0]["file_name"] == "pictures/b.jpg"
