import numpy as np
import pytest
from annotation_files import annotation, content, load
from PIL import Image

from tailseg.data.annotations.annotations import Category
from tailseg.data.exporters.records import ExportImage, ExportObject, ExportSet, class_names, images_of, single_objects
from tailseg.data.importers.foreign import LeftOut
from tailseg.errors import UserError


def named(*names):
    return ExportSet("set.json", [Category(5 + i, name, "f", 1, 1) for i, name in enumerate(names)], {})


def test_images_of_an_annotation_file(tmp_path):
    rle = {"size": [40, 50], "counts": [0, 40, 1960]}
    rows = [
        annotation(7, 1, 9, segmentation=rle, iscrowd=1, area=40, bbox=[0, 0, 1, 40]),
        annotation(8, 1, 4, bbox=[10.25, 10, 20, 20], ignore=1),
    ]
    data = content(rows)
    data["images"][0] |= {"file_name": "sub/é.png", "neg_category_ids": [9, 2], "not_exhaustive_category_ids": [4]}
    for name in ("sub/é.png", "1.jpg"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (50, 40)).save(tmp_path / "images" / name)
    first, second = images_of(load(tmp_path, data))
    assert (first.name, first.path, first.image_hw) == ("sub/é.png", tmp_path / "images/sub/é.png", (40, 50))
    assert (first.id, first.neg_category_ids, first.not_exhaustive_category_ids) == (5, [9, 2], [4])
    assert list(first.objects) == []
    assert (second.id, second.name, second.neg_category_ids) == (1, "1.jpg", None)
    crowd, dog = second.objects
    assert (crowd.id, crowd.label, crowd.crowd, crowd.area, crowd.box) == (7, 2, True, 40, (0, 0, 1, 40))
    assert isinstance(crowd.segmentation, bytes)
    assert (crowd.ignored, dog.ignored) == (False, True)
    assert (dog.id, dog.label, dog.crowd, dog.area, dog.box) == (8, 1, False, 400, (10.25, 10, 20, 20))
    assert [polygon.tolist() for polygon in dog.segmentation] == [[10, 10, 30, 10, 30, 30, 10, 30]]


def test_ids_of_64_bits_are_those_of_the_file(tmp_path):
    data = content([])
    data["images"][1]["id"] = 2**64 - 1
    for name in ("5.jpg", "1.jpg"):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / name).touch()
    assert [image.id for image in images_of(load(tmp_path, data))] == [5, 2**64 - 1]


def test_an_image_that_is_gone_is_named(tmp_path):
    with pytest.raises(UserError, match=r"image 5: '5\.jpg' is not in"):
        next(images_of(load(tmp_path)))


def test_crowds_and_ignored_objects_are_left_out_and_counted(tmp_path):
    box, square = (0.0, 0.0, 2.0, 2.0), [np.array([0.0, 0, 2, 0, 2, 2])]
    flags = ({"crowd": True}, {}, {"crowd": True}, {"ignored": True})
    objects = [ExportObject(0, box, square, 4.0, **flag) for flag in flags]
    found = LeftOut()
    assert single_objects(ExportImage("a", tmp_path, (4, 4), objects), "a.jpg", found) == objects[1:2]
    assert found.notes() == [
        "2 crowds left out: the format has no mark for them (a.jpg, a.jpg)",
        "1 ignored objects left out: the format has no mark for them (a.jpg)",
    ]
    assert single_objects(ExportImage("a", tmp_path, (4, 4), []), "b.jpg", found) == []
    assert sum(found.counts.values()) == 3


def test_names_of_classes_tell_them_apart():
    assert class_names(named("cat", " egg cup ", "深")) == ["cat", "egg cup", "深"]
    for names, sentence in (
        (("cat", "dog", "cat "), "set.json: the categories 5 and 7 are both called 'cat'; give each its own name"),
        (("cat", " "), "set.json: category 6 has the name ' '; give it one of plain text"),
        (("a\nb",), "set.json: category 5 has the name 'a\\nb'; give it one of plain text"),
    ):
        with pytest.raises(UserError) as caught:
            class_names(named(*names))
        assert str(caught.value) == sentence
