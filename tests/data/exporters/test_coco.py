import json

import numpy as np
import pytest
from export_sets import (
    CATEGORIES,
    an_object,
    assert_same_objects,
    code_of,
    exported,
    mask_of,
    plans,
    written,
)
from hypothesis import given
from pycocotools.coco import COCO

from tailseg.data.importers.coco import read_coco

SQUARE = [np.array([1.0, 1, 3, 1, 3, 3, 1, 3])]


def objects(*changes):
    return [an_object(1, SQUARE, (6, 8), **change) for change in changes]


@given(plan=plans())
def test_out_and_in_again(plan, tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    trip = written(plan, folder / "in")
    exported("coco", trip, folder / "out")
    assert_same_objects(trip, read_coco(folder / "out"), crowds=True)


@given(plan=plans())
def test_pycocotools_reads_the_same_objects(plan, tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    trip = written(plan, folder / "in")
    exported("coco", trip, folder / "out")
    for split, images in trip.data.splits.items():
        judge = COCO(str(folder / f"out/annotations/instances_{split}.json"))
        assert sorted(judge.imgs) == sorted(image.id for image in images)
        for image in images:
            row = judge.imgs[image.id]
            assert trip.content[(folder / "out/images" / split / row["file_name"]).read_bytes()] is image
            annotations = judge.imgToAnns[image.id]
            for item, ours in zip(annotations, image.objects, strict=True):
                pixels = mask_of(ours.segmentation, image.image_hw)
                assert np.array_equal(judge.annToMask(item), pixels)
                assert (item["category_id"], item["area"]) == (CATEGORIES[ours.label].id, pixels.sum())
                assert (item["iscrowd"], item["bbox"]) == (ours.crowd, list(ours.box))


@pytest.mark.parametrize("split", ["val", ""])
def test_the_files(split, tmp_path):
    rle = code_of(np.eye(6, 8))
    items = [
        *objects({"id": 2**60}, {"score": 0.25, "id": 7}),
        an_object(0, rle, (6, 8), crowd=True, ignored=True, id=-3),
    ]
    extras = {"neg_category_ids": [3, 9], "not_exhaustive_category_ids": []}
    plan = {split: [{"name": "x y.png", "image_hw": (6, 8), "objects": items} | extras]}
    trip = written(plan, tmp_path / "in")
    done = exported("coco", trip, tmp_path / "out")
    assert (done.images, done.objects) == ({split: 1}, {split: 3})
    assert done.notes == ["images are hard links to the source's files"]
    content = json.loads((tmp_path / f"out/annotations/instances_{split or 'default'}.json").read_text())
    assert content["images"] == [{"id": 1001, "file_name": "x y.png", "height": 6, "width": 8} | extras]
    assert (tmp_path / "out/images" / split / "x y.png").is_file()
    assert content["categories"][0] == {"id": 3, "name": "yes"}
    square, scored, crowd = content["annotations"]
    assert square == {
        **{"id": 2**60, "image_id": 1001, "category_id": 4, "bbox": [1, 1, 2, 2], "area": 4, "iscrowd": 0},
        "segmentation": [[1, 1, 3, 1, 3, 3, 1, 3]],
    }
    assert (scored["id"], scored["score"]) == (7, 0.25)
    assert (crowd["id"], crowd["iscrowd"], crowd["ignore"]) == (-3, 1, 1)
    assert crowd["segmentation"] == {"size": [6, 8], "counts": rle.decode()}


def test_without_ids_things_are_numbered(tmp_path):
    plan = {"": [{"name": name, "image_hw": (6, 8), "objects": objects({}, {})} for name in ("a.png", "b.png")]}
    trip = written(plan, tmp_path / "in")
    for image in trip.data.splits[""]:
        object.__setattr__(image, "id", None)
    exported("coco", trip, tmp_path / "out")
    content = json.loads((tmp_path / "out/annotations/instances_default.json").read_text())
    assert [row["id"] for row in content["images"]] == [1, 2]
    assert [(row["id"], row["image_id"]) for row in content["annotations"]] == [(1, 1), (2, 1), (3, 2), (4, 2)]


def test_frequencies_are_written_where_the_data_states_them(tmp_path):
    trip = written({"train": [{"name": "a.png", "image_hw": (6, 8), "objects": []}]}, tmp_path / "in")
    object.__setattr__(trip.data, "frequencies", True)
    exported("coco", trip, tmp_path / "out")
    content = json.loads((tmp_path / "out/annotations/instances_train.json").read_text())
    assert content["categories"][0] == {"id": 3, "name": "yes", "frequency": "f"}
    assert content["annotations"] == []
