import json

import numpy as np
import pytest
from annotation_files import annotation, content, fault, load

from tailseg.data.annotations.annotations import load_annotations, summary
from tailseg.errors import UserError


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


def test_no_annotations_at_all(tmp_path):
    data = load(tmp_path, content([]))
    assert data.boxes.shape == (0, 4)
    assert data.image_counts().tolist() == [0, 0, 0]
    assert data.report.empty_images == 2


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
    "rle size": (
        content([annotation(3, segmentation={"size": [50, 40], "counts": "0"})]),
        r"annotation 3: the RLE's size is \[50, 40\] but the image's is \[40, 50\]",
    ),
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


def test_number_beyond_floats_is_refused(tmp_path):
    text = json.dumps(content([annotation(3, segmentation=[[777, 2, 3, 4, 5, 6]])])).replace("777", "1e999")
    assert "not valid JSON" in fault(tmp_path, text)


def test_a_file_for_a_test_server_has_no_list_of_annotations(tmp_path):
    made = content()
    del made["annotations"]
    (tmp_path / "test.json").write_text(json.dumps(made))
    found = load_annotations(tmp_path / "test.json", tmp_path)
    assert (len(found), found.report.annotations, len(found.labels)) == (len(made["images"]), 0, 0)
    assert found.report.empty_images == len(found)
