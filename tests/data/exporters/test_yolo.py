import numpy as np
import pytest
import yaml
from export_sets import CATEGORIES, an_object, assert_same_objects, code_of, exported, mask_of, plans, polygons, written
from hypothesis import given
from hypothesis import strategies as st

from tailseg.data.annotations.annotations import Category
from tailseg.data.exporters.export import export
from tailseg.data.exporters.outlines import as_one_polygon
from tailseg.data.exporters.records import ExportSet
from tailseg.data.exporters.yolo import label_line
from tailseg.data.importers.yolo import read_yolo
from tailseg.errors import UserError

HW = (10, 20)


def out_of(tmp_path, objects, name="a.png", split="train"):
    trip = written({split: [{"name": name, "image_hw": HW, "objects": objects}]}, tmp_path / "in")
    return exported("yolo", trip, tmp_path / "out")


@given(plan=plans())
def test_out_and_in_again(plan, tmp_path_factory):
    folder = tmp_path_factory.mktemp("yolo")
    trip = written(plan, folder / "in")
    done = exported("yolo", trip, folder / "out")
    assert_same_objects(trip, read_yolo(folder / "out"))
    crowds = sum(item.crowd for images in plan.values() for image in images for item in image["objects"])
    assert sum(note.startswith(f"{crowds} crowds left out") for note in done.notes) == (crowds > 0)


@given(
    st.tuples(st.integers(2, 9000), st.integers(2, 9000)).flatmap(lambda hw: st.tuples(st.just(hw), polygons(hw))),
)
def test_decimals_suffice_for_large_images(case):
    """Corners come back to the thousandth of a pixel that is written, so on the same fifth, with the same mask."""
    (height, width), polygon = case
    corners = as_one_polygon([polygon], (height, width))
    label, *shares = map(float, label_line(3, corners, (height, width)).split())
    assert label == 3
    assert np.array_equal(np.round(np.reshape(shares, (-1, 2)) * (width, height), 3).ravel(), corners)
    assert np.array_equal(np.trunc(5 * corners + 0.5), np.trunc(5 * polygon + 0.5))


def test_the_files(tmp_path):
    ring = np.ones(HW)
    ring[3:6, 3:6] = 0
    square = np.array([2.0, 1, 12, 1, 12, 6.5, 2, 6.5])
    objects = [an_object(3, [square], HW), an_object(0, code_of(ring), HW), an_object(0, code_of(ring), HW, crowd=True)]
    done = out_of(tmp_path, objects, name="sub/images/a b.png")
    assert (tmp_path / "out/images/train/sub/a b.png").is_file()
    lines = (tmp_path / "out/labels/train/sub/a b.txt").read_text().splitlines()
    assert lines[0] == "3 0.1 0.1 0.6 0.1 0.6 0.65 0.1 0.65"
    numbers = np.array(lines[1].split()[1:], np.float64)
    assert np.array_equal(mask_of([numbers * np.resize(HW[::-1], numbers.shape)], HW), ring)
    assert len(lines) == 2
    content = yaml.safe_load((tmp_path / "out/data.yaml").read_text())
    assert content == {"train": "images/train", "names": {i: row.name for i, row in enumerate(CATEGORIES)}}
    assert done.objects == {"train": 2}
    assert done.notes[0].startswith("1 images renamed")
    assert done.notes[1] == "1 crowds left out: the format has no mark for them (sub/a b.png)"


def test_a_set_without_splits_and_an_image_without_objects(tmp_path):
    done = out_of(tmp_path, [an_object(0, code_of(np.zeros(HW)), HW)], split="")
    assert (tmp_path / "out/labels/a.txt").read_text() == ""
    assert (tmp_path / "out/images/a.png").is_file()
    assert yaml.safe_load((tmp_path / "out/data.yaml").read_text())["train"] == "images"
    assert (done.objects, done.notes[0]) == ({"": 0}, "1 objects without a mask left out (a.png)")


@pytest.mark.parametrize("kind", ["yolo", "labelme", "cvat", "voc"])
def test_formats_that_tell_classes_by_name_refuse_twins(kind, tmp_path):
    twins = [Category(1, "bat", "f", 1, 1), Category(2, "bat", "f", 1, 1)]
    with pytest.raises(UserError, match="set: the categories 1 and 2 are both called 'bat'"):
        export(kind, ExportSet("set", twins, {"train": []}), tmp_path / "out")
    assert not (tmp_path / "out").exists()
