"""Sure detections against annotations: images 5 and 1, in this order, of 40 x 50 pixels; cat 2, dog 4, owl 9."""

import json

import pytest
from annotation_files import annotation, content, load

from tailseg.errors import UserError
from tailseg.evaluation.suspicious_labels import Disagreement, disagreements, label_findings

HERE, THERE = [10, 10, 20, 20], [30, 25, 10, 12]


def detection(image_id, category_id, box, score):
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}


def told(found):
    return [(d.image_id, d.annotation_id, d.annotated, d.found, d.score) for d in found]


def test_another_class_and_an_object_that_nobody_annotated(tmp_path):
    """By the ids of the file, which are neither in order nor small; the highest score first."""
    data = content([annotation(2**60, 1, 2), annotation(7, 5, 9)])
    rows = [
        detection(1, 9, HERE, 0.8),  # annotated as a cat
        detection(5, 9, HERE, 0.95),  # right
        detection(5, 4, THERE, 0.9),  # nothing is annotated there
    ]
    found = disagreements(load(tmp_path, data), rows)
    assert found == [
        Disagreement(5, "5.jpg", None, None, "dog", 0.9, (30.0, 25.0, 10.0, 12.0)),
        Disagreement(1, "1.jpg", 2**60, "cat", "owl", 0.8, (10.0, 10.0, 20.0, 20.0)),
    ]
    assert [str(item) for item in found] == [
        "image 5 (5.jpg): 'dog' with 0.90 at x 30, y 25, 10 x 12 pixels",
        f"image 1 (1.jpg): annotation {2**60} is 'cat', found 'owl' with 0.80",
    ]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([detection(1, 9, HERE, 0.69)], []),  # not sure
        ([detection(1, 9, HERE, 0.7)], [(1, 1, "cat", "owl", 0.7)]),
        ([detection(1, 2, HERE, 0.2), detection(1, 9, HERE, 0.9)], []),  # the model finds the annotated class too
        ([detection(1, 9, [10, 10, 20, 7], 0.9)], []),  # the object is met, but not well enough for a verdict
        ([detection(1, 9, [10, 10, 20, 0], 0.9)], []),  # without area
        ([detection(1, 9, HERE, 0.8), detection(1, 4, HERE, 0.9)], [(1, 1, "cat", "dog", 0.9)]),  # one an annotation
        (
            [
                detection(1, 4, THERE, 0.8),
                detection(1, 9, [30, 25, 10, 11], 0.9),
                detection(5, 4, THERE, 0.75),
            ],
            [(1, None, None, "owl", 0.9), (5, None, None, "dog", 0.75)],  # one in each place of an image
        ),
        ([], []),
    ],
)
def test_detections_that_count(tmp_path, rows, expected):
    assert told(disagreements(load(tmp_path), rows)) == expected


def test_the_limit_of_sureness_can_be_lowered(tmp_path):
    rows = [detection(1, 9, HERE, 0.4)]
    assert told(disagreements(load(tmp_path), rows, sure=0.3)) == [(1, 1, "cat", "owl", 0.4)]


def test_what_lvis_leaves_open_is_left_alone(tmp_path):
    """Image 1: dogs were looked for in vain, cats are not all annotated, nobody looked for owls."""
    data = content([annotation(1, 1, 2)])
    data["images"][1] |= {"neg_category_ids": [4], "not_exhaustive_category_ids": [2]}
    data["images"][0] |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    rows = [detection(1, category_id, THERE, 0.9) for category_id in (2, 9)]
    rows += [detection(1, 4, [0, 0, 9, 9], 0.9), detection(5, 4, HERE, 0.9)]
    assert told(disagreements(load(tmp_path, data), rows)) == [(1, None, None, "dog", 0.9)]


@pytest.mark.parametrize("found", [2, 9])
def test_crowds_hold_any_number_of_objects_and_hide_others(tmp_path, found):
    data = content([annotation(1, 1, 2, iscrowd=1), annotation(2, 5, 9)])
    inside, beside = [25, 10, 10, 5], [26, 10, 10, 5]  # half of it lies in the crowd, less than half
    assert told(disagreements(load(tmp_path, data), [detection(1, found, inside, 0.9)])) == []
    beyond = disagreements(load(tmp_path, data), [detection(1, 9, beside, 0.9)])
    assert told(beyond) == [(1, None, None, "owl", 0.9)]


@pytest.mark.parametrize("found", [2, 9])
def test_objects_to_ignore_contradict_nobody(tmp_path, found):
    """An object with "ignore" is none to be sure about, of whatever class it is found."""
    data = content([annotation(1, 1, 2, ignore=1), annotation(2, 5, 9)])
    assert told(disagreements(load(tmp_path, data), [detection(1, found, HERE, 0.9)])) == []


def test_images_by_ids_beyond_63_bits(tmp_path):
    data = content([annotation(1, 2**64 - 1, 2)])
    data["images"][1]["id"] = 2**64 - 1
    found = disagreements(load(tmp_path, data), [detection(2**64 - 1, 9, HERE, 0.9), detection(5, 4, HERE, 0.8)])
    assert told(found) == [(2**64 - 1, 1, "cat", "owl", 0.9), (5, None, None, "dog", 0.8)]
    assert [item.file_name for item in found] == ["1.jpg", "5.jpg"]


def test_nothing_is_annotated(tmp_path):
    assert disagreements(load(tmp_path, content([])), [detection(1, 2, HERE, 0.9)]) == []


def test_boxes_are_ranked_by_their_own_scores(tmp_path):
    rows = [detection(1, 9, HERE, 0.1) | {"box_score": 0.9}]
    assert told(disagreements(load(tmp_path), rows)) == [(1, 1, "cat", "owl", 0.9)]


def test_a_results_file(tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps([detection(1, 9, HERE, 0.9)]))
    assert told(disagreements(load(tmp_path), path)) == [(1, 1, "cat", "owl", 0.9)]
    path.write_text(json.dumps([{"image_id": 1, "category_id": 9, "score": 0.9}]))
    with pytest.raises(UserError, match=r"r\.json: row 0 has no 'bbox'"):
        disagreements(load(tmp_path), path)


def test_findings_count_and_name_both_kinds(tmp_path):
    rows = [detection(1, 9, HERE, 0.8), detection(5, 4, THERE, 0.9), detection(1, 4, THERE, 0.7)]
    wrong, missing = label_findings(disagreements(load(tmp_path), rows), "val", "m.safetensors")
    assert (wrong.severity, wrong.split, wrong.count) == ("note", "val", 1)
    assert wrong.what == "annotations in whose place m.safetensors finds another class"
    assert wrong.examples == ("image 1 (1.jpg): annotation 1 is 'cat', found 'owl' with 0.80",)
    assert (missing.severity, missing.count) == ("note", 2)
    assert [text.split(":")[0] for text in missing.examples] == ["image 5 (5.jpg)", "image 1 (1.jpg)"]
    assert [finding.count for finding in label_findings([], "val", "m")] == [0, 0]
