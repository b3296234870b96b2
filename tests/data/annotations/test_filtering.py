"""What is kept of a file's annotations, and what the report says of the rest."""

import json

import pytest
from annotation_files import SQUARE, annotation, content, load

from tailseg.data.annotations.annotations import load_annotations, summary


def test_filter_counts_what_it_drops(tmp_path):
    rows = [
        annotation(1),
        annotation(2, bbox=[50, 10, 20, 20], segmentation=[[50, 10, 70, 10, 60, 30]]),  # begins where the image ends
        annotation(3, bbox=[-20, 10, 20, 20], segmentation=[[-20, 10, 0, 10, -10, 30]]),
        annotation(4, area=0),
        annotation(5, bbox=[10, 10, 0.5, 20]),
        annotation(6, bbox=[10, 10, 0, 20], segmentation=[[10, 10, 10, 20, 10, 30]]),  # no width: it meets nothing
        annotation(7, iscrowd=1, segmentation={"size": [40, 50], "counts": [100, 50, 1850]}),
        annotation(8, bbox=[49, 39, 20, 20]),  # meets the last pixel
        annotation(9, bbox=[10, 10, 1, 1], category_id=4),
    ]
    data = load(tmp_path, content(rows))
    assert data.annotation_ids.tolist() == [1, 5, 7, 8, 9]
    assert data.trained.tolist() == [True, False, False, True, True]  # the thin one and the crowd are scored only
    report = data.report
    assert (report.annotations, report.crowd, report.thin, report.dropped) == (9, 1, 1, 4)
    assert met(data) == {"outside": 3, "no_area": 1}
    assert report.empty_images == 1
    assert data.annotation_ids[data.rows(1)].tolist() == [1, 8, 9]
    assert data.rows(0).size == 0
    assert data.image_counts().tolist() == [1, 1, 0]
    assert [c.instance_count for c in data.categories] == [2, 1, 0]


def met(data):
    return {oddity.kind: oddity.count for oddity in data.report.oddities}


def test_thin_object_with_a_faulty_mask_is_dropped_and_counted(tmp_path):
    data = load(tmp_path, content([annotation(1), annotation(2, bbox=[10, 10, 0.5, 20], segmentation=[[1, 1, 2, 2]])]))
    assert data.annotation_ids.tolist() == [1]
    assert (data.report.thin, data.report.dropped) == (0, 1)
    expected = "; 1 annotations with a broken mask or of another size than the image: left out (annotation 2: a polygon"
    assert expected in summary(data)


def test_objects_without_a_mask_are_left_out_and_counted_and_the_others_kept(tmp_path):
    """Label Studio, detectron2 and others write boxes as objects with "segmentation": []."""
    rows = [annotation(i) for i in range(1, 9)]
    rows[1]["segmentation"] = []
    rows[2]["segmentation"] = None
    del rows[3]["segmentation"]
    rows[4]["segmentation"] = [[1, 2, 3]]
    rows[5]["segmentation"] = [[1, 2], SQUARE]
    rows[6]["segmentation"] = {"size": [50, 40], "counts": [2000]}
    data = load(tmp_path, content(rows))
    assert data.annotation_ids.tolist() == [1, 6, 8]
    assert met(data) == {"no_mask": 3, "bad_mask": 2, "ring": 1}
    assert data.report.oddities[0].places == (
        "annotation 2: segmentation is []",
        "annotation 3: segmentation is None",
        "annotation 4: segmentation is missing",
    )
    assert data.report.oddities[1].places[1] == "annotation 7: the RLE's size is [50, 40] but the image's is [40, 50]"
    assert [p.tolist() for p in data.segmentation(1)] == [SQUARE]


def test_boxes_and_areas_that_are_missing_or_no_numbers_are_taken_from_the_masks(tmp_path):
    """Tools leave them out: mmdetection#804, maskrcnn-benchmark#480."""
    code = {"size": [40, 50], "counts": [40 * 5 + 3, 10, 1800 - 13]}  # ten pixels of column 5 from row 3 on
    code["counts"][2] = 2000 - sum(code["counts"][:2])
    rows = [annotation(i) for i in range(1, 8)]
    del rows[0]["bbox"], rows[0]["area"]
    rows[1] |= {"bbox": None, "area": None}
    rows[2] |= {"bbox": [1, 2, 3], "area": "4"}
    rows[3] |= {"bbox": [1, 2, 3, "x"], "area": True}
    rows[4] |= {"bbox": [0, 0, 1e300, 5]}
    rows[5] |= {"bbox": "x", "segmentation": code, "area": None}
    rows += [annotation(8, bbox=[30, 30, -20, 20], area=-1)]
    data = load(tmp_path, content(rows))
    assert data.boxes_xywh.tolist() == [*[[10, 10, 20, 20]] * 5, [5, 3, 1, 10], *[[10, 10, 20, 20]] * 2]
    assert data.areas.tolist() == [400] * 5 + [10, 400, 400]
    assert met(data) == {"box": 7, "area": 6}


def test_boxes_that_do_not_meet_the_image_are_taken_from_masks_that_do(tmp_path):
    """Zeros for a box that a tool does not know; `pycocotools` and lvis-api score such masks."""
    boxes = ([0, 0, 0, 0], [10, 10, 0, 20], [50, 10, 20, 20], [-30, 10, 20, 20], [10, 10, 0.5, 20])
    rows = [annotation(number, bbox=box) for number, box in enumerate(boxes, start=1)]
    data = load(tmp_path, content(rows))
    assert data.boxes_xywh.tolist() == [*[[10, 10, 20, 20]] * 4, [10, 10, 0.5, 20]]
    assert data.trained.tolist() == [*[True] * 4, False]
    assert met(data) == {"box": 4}


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_are_none_count_as_missing(tmp_path, word):
    """As Python writes them, and pycocotools reads them."""
    rows = [
        annotation(1, area="?"),
        annotation(2, bbox=[1, "?", 2, 3]),
        annotation(3, segmentation=[[1, 1, 9, 9, "?", 1]]),
    ]
    rows.append(annotation(4, note='NaN is a word here " NaN'))
    data = load(tmp_path, json.dumps(content(rows)).replace('"?"', word))
    assert data.annotation_ids.tolist() == [1, 2, 4]
    assert (data.areas[0], data.boxes_xywh[1].tolist()) == (400, [10, 10, 20, 20])
    assert met(data) == {"bad_mask": 1, "box": 1, "area": 1}


def test_entries_that_are_no_objects_are_left_out_and_counted(tmp_path):
    data = load(tmp_path, content([None, annotation(1), 5, annotation(2)]))
    assert data.annotation_ids.tolist() == [1, 2]
    assert (data.report.annotations, data.report.dropped) == (4, 2)
    assert met(data) == {"no_object": 2}
    assert data.report.oddities[0].places == (
        "annotation number 1 of the list: None",
        "annotation number 3 of the list: 5",
    )


def test_without_masks_a_box_is_needed(tmp_path):
    rows = [annotation(1, segmentation=[], bbox=None), annotation(2, segmentation=[]), annotation(3, bbox=None)]
    (tmp_path / "train.json").write_text(json.dumps(content(rows)))
    data = load_annotations(tmp_path / "train.json", tmp_path, masks=False)
    assert data.annotation_ids.tolist() == [2, 3]
    assert met(data) == {"no_box": 1, "box": 1}
    assert load(tmp_path, content(rows)).annotation_ids.tolist() == [3]


def test_annotations_of_images_that_are_not_there_are_left_out(tmp_path):
    data = load(tmp_path, content([annotation(1), annotation(2, 8), annotation(3, None), annotation(4, "x")]))
    assert data.annotation_ids.tolist() == [1]
    assert met(data) == {"no_image": 3}
    assert set(data.report.oddities[0].places) == {
        "annotation 2: there is no image with the image_id 8",
        "annotation 3: its image_id is None",
        "annotation 4: its image_id is 'x'",
    }


@pytest.mark.parametrize(
    ("flag", "crowd", "odd"),
    [
        *[(flag, True, 0) for flag in (1, True, 1.0, "1")],
        *[(flag, False, 0) for flag in (0, False, None, 0.0, "0")],
        *[(flag, False, 1) for flag in (2, "yes", [1], {}, 0.5)],
    ],
)
def test_a_crowd_is_told_by_its_flag(tmp_path, flag, crowd, odd):
    data = load(tmp_path, content([annotation(1, iscrowd=flag)]))
    assert data.crowd.tolist() == [crowd]
    assert met(data) == ({"crowd_flag": 1} if odd else {})


def test_a_missing_crowd_flag_is_no_crowd(tmp_path):
    row = annotation(1)
    del row["iscrowd"]
    data = load(tmp_path, content([row]))
    assert (data.crowd.tolist(), met(data)) == ([False], {})


def test_ignored_objects_are_kept_but_not_trained_on(tmp_path):
    data = load(tmp_path, content([annotation(1), annotation(2, ignore=1), annotation(3, ignore=0)]))
    assert data.ignored.tolist() == [False, True, False]
    assert data.trained.tolist() == [True, False, True]
    assert (data.report.ignored, data.report.crowd, data.report.dropped) == (1, 0, 0)
    assert "3 annotations, 1 to be ignored" in summary(data)


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
