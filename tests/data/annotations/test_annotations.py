import json
import os

import numpy as np
import pytest
from pycocotools import mask as coco

from tailseg.data.annotations.annotations import frequency_group, load_annotations, summary
from tailseg.data.sources import open_data
from tailseg.errors import UserError

SQUARE = [10, 10, 30, 10, 30, 30, 10, 30]


def annotation(number, image_id=1, category_id=2, **changes):
    row = {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [10, 10, 20, 20],
        "area": 400,
    }
    return row | {"iscrowd": 0, "segmentation": [SQUARE]} | changes


def content(annotations=None, **changes):
    """Two images of 40 x 50 pixels, three categories out of order."""
    images = [{"id": i, "height": 40, "width": 50, "file_name": f"{i}.jpg"} for i in (5, 1)]
    categories = [{"id": 9, "name": "owl"}, {"id": 2, "name": "cat"}, {"id": 4, "name": "dog"}]
    rows = [annotation(1), annotation(2, 5, 9)] if annotations is None else annotations
    return {"images": images, "annotations": rows, "categories": categories} | changes


def load(folder, data=None, **options):
    path = folder / "train.json"
    path.write_text(data if isinstance(data, str) else json.dumps(content() if data is None else data))
    return load_annotations(path, folder / "images", **options)


def fault(folder, data):
    with pytest.raises(UserError) as caught:
        load(folder, data)
    message = str(caught.value)
    assert message.startswith(f"{folder / 'train.json'}: ")
    assert "\n" not in message
    return message


def test_labels_are_positions_in_id_order(tmp_path):
    data = load(tmp_path)
    assert [(c.id, c.name) for c in data.categories] == [(2, "cat"), (4, "dog"), (9, "owl")]
    assert data.label_to_category_id.tolist() == [2, 4, 9]
    assert data.category_id_to_label(np.array([9, 2, 2])).tolist() == [2, 0, 0]
    with pytest.raises(ValueError, match="received 3"):
        data.category_id_to_label(np.array([3]))


def test_annotations_are_sorted_by_image(tmp_path):
    rows = [annotation(1, 1), annotation(2, 5, 9, bbox=[1, 2, 3.5, 4]), annotation(3, 1, 4), annotation(4, 5)]
    data = load(tmp_path, content(rows))
    assert data.image_ids.tolist() == [5, 1]
    assert data.rows(0).tolist() == [0, 1]
    assert data.annotation_ids.tolist() == [2, 4, 1, 3]
    assert data.labels.tolist() == [2, 0, 0, 1]
    assert data.boxes[0].tolist() == [1, 2, 4.5, 6]
    assert data.image_hws.tolist() == [[40, 50], [40, 50]]


def test_filter_counts_what_it_drops(tmp_path):
    rows = [
        annotation(1),
        annotation(2, bbox=[50, 10, 20, 20]),  # begins where the image ends
        annotation(3, bbox=[-20, 10, 20, 20]),
        annotation(4, area=0),
        annotation(5, bbox=[10, 10, 0.5, 20]),
        annotation(6, bbox=[10, 10, 0, 20]),  # no width: it meets nothing
        annotation(7, iscrowd=1, segmentation={"size": [40, 50], "counts": [100, 50, 1850]}),
        annotation(8, bbox=[49, 39, 20, 20]),  # meets the last pixel
        annotation(9, bbox=[10, 10, 1, 1], category_id=4),
    ]
    data = load(tmp_path, content(rows))
    assert data.annotation_ids.tolist() == [1, 5, 7, 8, 9]
    assert data.trained.tolist() == [True, False, False, True, True]  # the thin one and the crowd are scored only
    report = data.report
    assert (report.annotations, report.crowd, report.outside, report.no_area, report.thin) == (9, 1, 3, 1, 1)
    assert report.dropped == 4
    assert report.empty_images == 1
    assert data.annotation_ids[data.rows(1)].tolist() == [1, 8, 9]
    assert data.rows(0).size == 0
    assert data.image_counts().tolist() == [1, 1, 0]
    assert [c.instance_count for c in data.categories] == [2, 1, 0]


def test_thin_object_with_a_faulty_mask_is_dropped_and_counted(tmp_path):
    data = load(tmp_path, content([annotation(1), annotation(2, bbox=[10, 10, 0.5, 20], segmentation=[[1, 1, 2, 2]])]))
    assert data.annotation_ids.tolist() == [1]
    assert (data.report.thin, data.report.thin_dropped, data.report.dropped) == (1, 1, 1)
    assert "dropped 1: 1 narrower or lower than a pixel with a faulty mask" in summary(data)


def test_area_that_the_file_does_not_state_is_the_masks(tmp_path):
    whole = {"size": [40, 50], "counts": [0, 2000]}
    square = [[10, 10, 20, 10, 20, 20, 10, 20]]
    rows = [
        annotation(1, area=None, segmentation=square),
        annotation(2, area=None, segmentation=whole),
        annotation(3, segmentation=square),
    ]
    for row in rows[:2]:
        del row["area"]
    data = load(tmp_path, content(rows))
    assert data.areas.tolist() == [100, 2000, annotation(3)["area"]]


def test_boxes_without_masks_can_be_read_if_asked_for(tmp_path):
    (tmp_path / "boxes.json").write_text(json.dumps(content([annotation(1, segmentation=None, area=None)])))
    with pytest.raises(UserError, match="annotation 1: segmentation is None"):
        load_annotations(tmp_path / "boxes.json", tmp_path)
    data = load_annotations(tmp_path / "boxes.json", tmp_path, masks=False)
    assert data.areas.tolist() == [np.prod(annotation(1)["bbox"][2:])]


@pytest.mark.parametrize(("number", "kind"), [(12.34, np.float32), (12.345, np.float64), (1 / 3, np.float64)])
def test_coordinates_come_back_to_the_last_digit(tmp_path, number, kind):
    polygons = [[number, 1.1, 30.3, 2.2, 7.7, 33.33]]
    data = load(tmp_path, content([annotation(1), annotation(2, segmentation=polygons)]))
    assert data.segmentations.coordinates.dtype == kind
    assert [polygon.tolist() for polygon in data.segmentation(1)] == polygons


def test_no_annotations_at_all(tmp_path):
    data = load(tmp_path, content([]))
    assert data.boxes.shape == (0, 4)
    assert data.image_counts().tolist() == [0, 0, 0]
    assert data.report.empty_images == 2


def test_polygons_and_both_kinds_of_rle(tmp_path):
    bitmap = np.asfortranarray(np.zeros((40, 50), np.uint8))
    bitmap[3:9, 4:20] = 1
    code = coco.encode(bitmap)["counts"]
    runs = [163] + [6, 34] * 15 + [6, 2000 - 163 - 40 * 15 - 6]
    rows = [
        annotation(1, segmentation=[SQUARE, [1, 2, 3, 4.25, 5, 6]]),
        annotation(2, segmentation={"size": [40, 50], "counts": code.decode()}),
        annotation(3, segmentation={"size": [40, 50], "counts": runs}),
        annotation(4, segmentation=[SQUARE]),
    ]
    data = load(tmp_path, content(rows))
    assert [p.tolist() for p in data.segmentation(0)] == [SQUARE, [1, 2, 3, 4.25, 5, 6]]
    assert data.segmentation(1) == data.segmentation(2) == code
    assert [p.tolist() for p in data.segmentation(3)] == [SQUARE]


def test_frequencies_stated_computed_and_taken_from_the_training_split(tmp_path):
    rows = [annotation(i, image, 2) for i, image in enumerate((1, 1, 5))] + [annotation(7, 5, 4)]
    computed = load(tmp_path, content(rows), rare_max=0, common_max=1)
    assert [c.frequency for c in computed.categories] == ["f", "c", "r"]  # in 2, 1 and 0 images
    assert not computed.frequency_stated
    taken = load(tmp_path, content([]), frequency_from=computed)
    assert [c.frequency for c in taken.categories] == ["f", "c", "r"]
    stated = content([])
    for row, group in zip(stated["categories"], "rcf", strict=True):
        row["frequency"] = group
    assert [c.frequency for c in load(tmp_path, stated, frequency_from=computed).categories] == [
        "c",
        "f",
        "r",
    ]
    assert [frequency_group(n) for n in (0, 10, 11, 100, 101)] == ["r", "r", "c", "c", "f"]


BAD = {
    "cut off": (json.dumps(content())[:150], "cut off at line 1, column"),
    "empty": ("", "the file is empty"),
    "not json": ("hello", "not valid JSON"),
    "not an object": ("[]", "expected an object"),
    "not a number": ('{"images": NaN}', "not valid JSON"),
    "no images": ({"annotations": [], "categories": []}, "'images' is missing"),
    "no annotations": ({"images": [], "categories": []}, "'annotations' is missing"),
    "wrong list": (content(images={}), "'images' is {}"),
    "wrong row": (content([3]), r"annotations\[0\] is 3"),
    "image twice": (content(images=content()["images"][:1] * 2), "image 5: this id occurs more than once"),
    "annotation twice": (content([annotation(3), annotation(3)]), "annotation 3: this id occurs more"),
    "category twice": (content(categories=[{"id": 2, "name": "a"}] * 2), "category 2: this id occurs more"),
    "no category": (
        content([annotation(3, 1, 8)]),
        "annotation 3: there is no category with the category_id 8",
    ),
    "no image": (content([annotation(3, 8)]), "annotation 3: there is no image with the image_id 8"),
    "id as string": (content([annotation("3")]), "annotation '3': id is '3'; it must be a whole number"),
    "id missing": (
        content([annotation(1), {"image_id": 1}]),
        "annotation number 2 of the list: id is missing",
    ),
    "huge id": (content([annotation(2**63)]), "is too large"),
    "image id as string": (content([annotation(3, "1")]), "annotation 3: image_id is '1'"),
    "box of three": (content([annotation(3, bbox=[1, 2, 3])]), r"annotation 3: bbox is \[1, 2, 3\]"),
    "box of words": (content([annotation(3, bbox=[1, 2, 3, "4"])]), "annotation 3: bbox is"),
    "area of words": (content([annotation(3, area="4")]), "annotation 3: area is '4'"),
    "two points": (
        content([annotation(3, segmentation=[[1, 2, 3, 4]])]),
        "annotation 3: a polygon has 4 coord",
    ),
    "odd": (
        content([annotation(3, segmentation=[SQUARE, [1, 2, 3, 4, 5, 6, 7]])]),
        "a polygon has 7 coordinates",
    ),
    "no polygon": (content([annotation(3, segmentation=[])]), "annotation 3: segmentation is empty"),
    "empty polygon": (
        content([annotation(3, segmentation=[[]])]),
        "annotation 3: a polygon has 0 coordinates",
    ),
    "flat": (
        content([annotation(3, segmentation=SQUARE)]),
        "annotation 3: a polygon is 10; it must be a flat",
    ),
    "points": (
        content([annotation(3, segmentation=[[[1, 2], [3, 4], [5, 6]]])]),
        "annotation 3: a polygon is",
    ),
    "words": (content([annotation(3, segmentation=[["1", 2, 3, 4, 5, 6]])]), "annotation 3: a polygon is"),
    "wild": (
        content([annotation(3, segmentation=[[1e9, 2, 3, 4, 5, 6]])]),
        "annotation 3: a polygon has a coord",
    ),
    "no segmentation": (content([annotation(3, segmentation=None)]), "annotation 3: segmentation is None"),
    "rle size": (
        content([annotation(3, segmentation={"size": [50, 40], "counts": "0"})]),
        r"annotation 3: the RLE's size is \[50, 40\] but the image's is \[40, 50\]",
    ),
    "rle sum": (
        content([annotation(3, segmentation={"size": [40, 50], "counts": [1, 2]})]),
        "that sum to 40 x 50",
    ),
    "rle short": (
        content([annotation(3, segmentation={"size": [40, 50], "counts": "02"})]),
        "covers 2 pixels",
    ),
    "rle code": (
        content([annotation(3, segmentation={"size": [40, 50], "counts": "z"})]),
        "not a compressed RLE",
    ),
    "rle none": (content([annotation(3, segmentation={"size": [40, 50]})]), "counts are None"),
    "flat image": (
        content(images=[{"id": 1, "height": 0, "width": 5, "file_name": "a"}]),
        "image 1: it has height 0",
    ),
    "no pictures": (content([], images=[]), "the list of images is empty"),
    "category name": (content(categories=[{"id": 2}]), "category 2: name is missing; it must be a string"),
    "negatives": (
        content(images=[{"id": 1, "height": 4, "width": 5, "file_name": "a", "neg_category_ids": ["x"]}]),
        "image 1: neg_category_ids must be",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(tmp_path, name):
    data, expected = BAD[name]
    message = fault(tmp_path, data)
    with pytest.raises(UserError, match=expected):
        raise UserError(message)


def test_image_without_a_name_is_named_when_its_file_is_wanted(tmp_path):
    """To score, no image file is needed."""
    data = load(tmp_path, content([], images=[{"id": 1, "height": 4, "width": 5}]))
    with pytest.raises(UserError, match="image 1: it has no file_name and no coco"):
        data.image_path(0)


def test_number_beyond_floats_is_refused(tmp_path):
    text = json.dumps(content([annotation(3, segmentation=[[777, 2, 3, 4, 5, 6]])])).replace("777", "1e999")
    assert "not valid JSON" in fault(tmp_path, text)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.json: no such file"):
        load_annotations(tmp_path / "nowhere.json", tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        load_annotations(tmp_path, tmp_path)
    with pytest.raises(UserError, match="there is no such folder of images"):
        load(tmp_path).check_images()


@pytest.mark.parametrize(
    ("entry", "place"),
    [
        ({"file_name": "a.jpg"}, "a.jpg"),
        ({"file_name": "deep/a.jpg"}, "deep/a.jpg"),
        ({"file_name": "a.jpg"}, "val2017/a.jpg"),
        ({"coco_url": "http://images/train2017/a.jpg"}, "a.jpg"),
        ({"coco_url": "http://images/train2017/a.jpg"}, "train2017/a.jpg"),
        ({"file_name": "gone.jpg", "coco_url": "http://images/test2017/a.jpg"}, "test2017/a.jpg"),
        ({"file_name": "COCO_train2014_000000000009.jpg"}, "train2017/000000000009.jpg"),
        ({"file_name": "COCO_val2014_000000000009.jpg"}, "COCO_val2014_000000000009.jpg"),
    ],
)
def test_images_are_found(tmp_path, entry, place):
    path = tmp_path / "images" / place
    path.parent.mkdir(parents=True)
    path.touch()
    data = load(tmp_path, content([], images=[{"id": 1, "height": 4, "width": 5, **entry}]))
    data.check_images()
    assert data.image_path(0) == path


def test_missing_image_is_named(tmp_path):
    (tmp_path / "images").mkdir()
    data = load(tmp_path)
    with pytest.raises(UserError, match=r"train\.json: image 5: '5\.jpg' is not in .*images.*; put it there"):
        data.check_images()


@pytest.mark.parametrize(
    "name", ["../secret.jpg", "/etc/passwd", "deep/../../secret.jpg", "..\\secret.jpg", "C:/x.jpg"]
)
def test_names_that_climb_out_are_refused(tmp_path, name):
    (tmp_path / "images").mkdir()
    (tmp_path / "secret.jpg").touch()
    data = load(tmp_path, content([], images=[{"id": 1, "height": 4, "width": 5, "file_name": name}]))
    with pytest.raises(UserError, match="image 1 leads out of the image folder"):
        data.image_path(0)


def test_links_may_not_lead_out_but_folders_may_be_links(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "store" / "sub").mkdir(parents=True)
    for name in ("secret.jpg", "store/5.jpg", "store/sub/1.jpg"):
        (tmp_path / name).touch()
    os.symlink(tmp_path / "secret.jpg", tmp_path / "images" / "1.jpg")
    os.symlink(tmp_path / "store", tmp_path / "images" / "train2017")
    data = load(tmp_path)
    assert data.image_path(0) == tmp_path / "images" / "train2017" / "5.jpg"
    with pytest.raises(UserError, match=r"image 1: .*1\.jpg is a link that leads out"):
        data.image_path(1)
    os.symlink(tmp_path, tmp_path / "images" / "up")
    nested = content([], images=[{"id": 1, "height": 4, "width": 5, "file_name": "up/secret.jpg"}])
    with pytest.raises(UserError, match="is a link that leads out"):
        load(tmp_path, nested).image_path(0)


def make_splits(folder, val=None):
    (folder / "images").mkdir()
    (folder / "train.json").write_text(json.dumps(content()))
    (folder / "val.json").write_text(json.dumps(val or content([])))


def test_open_data_from_a_folder_and_from_yaml(tmp_path):
    make_splits(tmp_path)
    splits = open_data(tmp_path, rare_max=0)
    assert splits.name == tmp_path.name
    assert [c.frequency for c in splits.val.categories] == ["c", "r", "c"]  # those of the training images
    (tmp_path / "pets.yaml").write_text("train: train.json\nval: val.json\nimages: images\n")
    again = open_data(str(tmp_path / "pets.yaml"), need=("val",), rare_max=0)
    assert again.name == "pets"
    assert again.val.path == tmp_path / "val.json"
    assert again.val.categories == splits.val.categories
    (tmp_path / "val.json").unlink()
    assert open_data(tmp_path, need=("train",)).val is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trian: a.json", "unknown entry 'trian'; did you mean 'train'"),
        ("train: 3", "train is 3; it must be a path"),
        ("- a", "expected the entries"),
        ("a: [", "not valid YAML at line"),
        ("train: train.json\nval: val.json", "the entry 'images' is missing"),
        ("train: train.json\nval: gone.json\nimages: images", r"gone\.json does not exist"),
        ("train: train.json\nval: val.json\nimages: val.json", r"val\.json is not a folder"),
    ],
)
def test_bad_yaml(tmp_path, text, expected):
    make_splits(tmp_path)
    (tmp_path / "d.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"d\.yaml: .*{expected}"):
        open_data(tmp_path / "d.yaml")


def test_missing_pieces_of_a_folder(tmp_path):
    make_splits(tmp_path)
    (tmp_path / "val.json").unlink()
    with pytest.raises(UserError, match=r"val\.json does not exist; it should be an annotation file"):
        open_data(tmp_path)
    with pytest.raises(UserError, match="no such folder or file"):
        open_data(tmp_path / "nowhere")
    with pytest.raises(UserError, match="expected a folder or a YAML file"):
        open_data(tmp_path / "train.json")


def test_splits_need_the_same_categories(tmp_path):
    val = content([])
    val["categories"][1]["name"] = "lynx"
    make_splits(tmp_path, val)
    with pytest.raises(UserError, match=r"category 2 is 'cat' in .*train\.json but 'lynx' in .*val\.json"):
        open_data(tmp_path)


def test_lvis_v1_set(shared):
    splits = open_data(shared / "data" / "coco128-lvis")
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


def test_a_file_for_a_test_server_has_no_list_of_annotations(tmp_path):
    made = content()
    del made["annotations"]
    (tmp_path / "test.json").write_text(json.dumps(made))
    found = load_annotations(tmp_path / "test.json", tmp_path)
    assert (len(found), found.report.annotations, len(found.labels)) == (len(made["images"]), 0, 0)
    assert found.report.empty_images == len(found)
