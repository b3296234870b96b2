import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tailseg.data.importers.convert import read_set
from tailseg.data.importers.split import class_images, divide, stratified_validation
from tailseg.data.sources import open_data
from tailseg.errors import UserError


@st.composite
def memberships(draw):
    """Images with the classes that they show."""
    images, classes = draw(st.integers(1, 30)), draw(st.integers(1, 8))
    sets = draw(st.lists(st.sets(st.integers(0, classes - 1)), min_size=images, max_size=images))
    pairs = [(image, label) for image, labels in enumerate(sets) for label in sorted(labels)]
    return np.array(pairs, np.int64).reshape(-1, 2), images, classes


@given(memberships(), st.floats(0.05, 0.6), st.integers(0, 5))
def test_every_class_keeps_a_training_image_and_single_ones_stay(case, share, seed):
    pairs, images, classes = case
    val = stratified_validation(pairs, images, classes, share, seed)
    assert val.shape == (images,)
    for label in range(classes):
        sides = val[pairs[pairs[:, 1] == label, 0]]
        if len(sides):
            assert not sides.all()
    assert (val == stratified_validation(pairs, images, classes, share, seed)).all()


def test_each_class_by_itself_gets_its_share():
    labels = np.repeat([0, 1, 2, 3], [1, 2, 10, 100])
    pairs = np.stack([np.arange(len(labels)), labels], axis=1)
    val = stratified_validation(pairs, len(labels), 4, 0.2, 0)
    assert np.bincount(labels[val], minlength=4).tolist() == [0, 1, 2, 20]
    assert (val != stratified_validation(pairs, len(labels), 4, 0.2, 1)).any()


def test_rare_classes_reach_validation_where_they_can():
    """Class 0 is in two images that also show frequent classes: one of them goes, whatever the seed."""
    pairs = [(0, 0), (1, 0), *((image, 1) for image in range(50)), *((image, 2) for image in range(0, 50, 2))]
    for seed in range(20):
        val = stratified_validation(np.array(sorted(pairs)), 50, 3, 0.2, seed)
        assert val[:2].sum() == 1
        assert 9 <= val.sum() <= 12


def test_a_class_that_a_rarer_one_holds_in_training():
    """Image 0 shows class 0, which has no other: it stays, and class 1, in images 0 and 1, sends image 1."""
    val = stratified_validation(np.array([(0, 0), (0, 1), (1, 1)]), 2, 2, 0.5, 0)
    assert val.tolist() == [False, True]


def test_images_without_objects_are_divided_too():
    val = stratified_validation(np.empty((0, 2), np.int64), 10, 3, 0.3, 0)
    assert val.sum() == 3


def test_crowds_do_not_count():
    rows = [{"image_id": 7, "category_id": 3, "iscrowd": 1}, {"image_id": 9, "category_id": 3}] * 2
    assert class_images(rows, [7, 9], [3]).tolist() == [[1, 0]]


@pytest.fixture
def source(tmp_path):
    """Ten images of two classes, one of them in two images, in a folder without val.json."""
    folder = tmp_path / "source"
    (folder / "images").mkdir(parents=True)
    images, rows = [], []
    for number in range(10):
        Image.new("RGB", (40, 36), (number, 0, 0)).save(folder / "images" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": 36, "width": 40, "neg_category_ids": [5]})
        box = {"bbox": [2, 2, 10, 10], "area": 100, "segmentation": [[2, 2, 12, 2, 12, 12, 2, 12]]}
        rows.append({"id": number, "image_id": number, "category_id": 5 if number < 2 else 4, **box})
    categories = [{"id": 5, "name": "rare", "synset": "rare.n.01"}, {"id": 4, "name": "often"}]
    content = {"images": images, "annotations": rows, "categories": categories}
    (folder / "train.json").write_text(json.dumps(content))
    return folder


def test_a_folder_is_read_and_divided(source):
    categories, part, _ = read_set(source)
    assert [row["id"] for row in categories] == [4, 5]
    division = divide(part, categories, share=0.2, seed=0, source=source)
    ids = [{row["id"] for row in part.images} for part in division.parts.values()]
    assert not ids[0] & ids[1]
    assert ids[0] | ids[1] == set(range(10))
    assert division.only_train == []
    assert all(row["neg_category_ids"] == [5] for row in division.parts["val"].images)
    assert read_set(source / "train.json")[1].images == part.images


def test_a_folder_with_both_splits_is_refused(source):
    (source / "val.json").write_text("{}")
    with pytest.raises(UserError, match=r"has a val.json already"):
        read_set(source)


def test_a_set_of_unique_images_cannot_be_divided(source):
    content = json.loads((source / "train.json").read_text())
    content["images"], content["annotations"] = content["images"][1:3], content["annotations"][1:3]
    (source / "train.json").write_text(json.dumps(content))
    categories, part, _ = read_set(source)
    with pytest.raises(UserError, match="can be spared for validation"):
        divide(part, categories, share=0.2, seed=0, source=source)


def test_real_photographs(shared, tmp_path):
    from tailseg.data.importers.writer import write_parts

    categories, part, _ = read_set(shared / "data" / "coco128-lvis" / "train.json")
    division = divide(part, categories, share=0.2, seed=0, source=shared)
    write_parts(tmp_path / "out", categories, division.parts)
    splits = open_data(str(tmp_path / "out"), show=False)
    assert len(splits.train) + len(splits.val) == 103
    once = {c.name for c, n in zip(splits.train.categories, splits.train.image_counts(), strict=True) if n == 1}
    for t, v in zip(splits.train.categories, splits.val.categories, strict=True):
        assert t.image_count > 0 or v.image_count == 0
        assert v.image_count > 0 or t.image_count == 0 or t.name in once or t.name in division.only_train
        assert t.frequency == v.frequency == ("r" if t.image_count <= 10 else "c" if t.image_count <= 100 else "f")
    assert len(division.only_train) == 16
