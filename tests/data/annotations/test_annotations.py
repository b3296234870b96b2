import json

import numpy as np
import pytest
from annotation_files import content, load

from tailseg.data.annotations.annotations import load_annotations
from tailseg.data.sources import open_splits
from tailseg.errors import UserError


def test_labels_are_positions_in_id_order(tmp_path):
    data = load(tmp_path)
    assert [(c.id, c.name) for c in data.categories] == [(2, "cat"), (4, "dog"), (9, "owl")]
    assert data.label_to_category_id.tolist() == [2, 4, 9]
    assert data.category_id_to_label(np.array([9, 2, 2])).tolist() == [2, 0, 0]
    with pytest.raises(ValueError, match="received 3"):
        data.category_id_to_label(np.array([3]))


def test_the_image_of_an_annotation_and_whether_a_file_is_exhaustive(tmp_path):
    """Images without annotations lie before, between and after."""
    images = [{"id": i, "height": 40, "width": 50, "file_name": f"{i}.jpg"} for i in range(5)]
    shape = {"bbox": [4, 4, 20, 20], "area": 400, "segmentation": [[4, 4, 24, 4, 24, 24, 4, 24]], "category_id": 4}
    rows = [shape | {"id": n, "image_id": i} for n, i in enumerate((1, 1, 3), start=1)]
    data = load(tmp_path, content(rows, images=images))
    assert [data.image_of(row) for row in range(3)] == [1, 1, 3]
    assert data.exhaustive
    images[2]["neg_category_ids"] = [2]
    assert not load(tmp_path, content(rows, images=images)).exhaustive


def test_image_without_a_name_is_named_when_its_file_is_wanted(tmp_path):
    """To score, no image file is needed."""
    data = load(tmp_path, content([], images=[{"id": 1, "height": 4, "width": 5}]))
    with pytest.raises(UserError, match="image 1: it has no file_name and no coco"):
        data.image_path(0)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.json: no such file"):
        load_annotations(tmp_path / "nowhere.json", tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        load_annotations(tmp_path, tmp_path)
    with pytest.raises(UserError, match="there is no such folder of images"):
        load(tmp_path).check_images()


def test_missing_image_is_named(tmp_path):
    (tmp_path / "images").mkdir()
    data = load(tmp_path)
    with pytest.raises(UserError, match=r"train\.json: image 5: '5\.jpg' is not in .*images.*; put it there"):
        data.check_images()


def test_lvis_v1_set(shared):
    splits = open_splits(shared / "data" / "coco128-lvis")
    train, val = splits.train, splits.val
    assert (len(train), len(val)) == (103, 25)
    assert (train.report.annotations, train.report.dropped, train.report.crowd) == (684, 0, 0)
    stated = json.loads((shared / "data" / "coco128-lvis" / "train.json").read_text())["categories"]
    assert {c.id: (c.image_count, c.instance_count, c.frequency) for c in train.categories} == {
        c["id"]: (c["image_count"], c["instance_count"], c["frequency"]) for c in stated
    }
    assert sum(map(len, train.neg_category_ids)) == 824
    assert sum(map(len, val.not_exhaustive_category_ids)) == 1
    train.check_images()
    val.check_images()


def test_lvis_v05_set(shared):
    data = load_annotations(shared / "data" / "lvis-val-100" / "lvis_val_100.json", shared)
    assert (len(data), len(data.labels), len(data.categories)) == (100, 977, 1230)
    assert data.report.empty_images == 7
    groups = [c.frequency for c in data.categories]
    assert [groups.count(g) for g in "rcf"] == [454, 461, 315]
