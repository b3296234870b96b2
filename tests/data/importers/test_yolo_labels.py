import os

import numpy as np
import pytest
from foreign_files import attempt, write_files
from hypothesis import given
from hypothesis import strategies as st

from tailseg.data.importers.foreign import LeftOut
from tailseg.data.importers.yolo_labels import (
    BESIDE_POLYGONS,
    CAUSES,
    CONFIDENCE,
    LONG_LINE,
    NO_NUMBERS,
    NO_SHAPE,
    NO_SIZE,
    OUTSIDE,
    REACHING,
    TRACKED,
    LabelFiles,
    parse_labels,
)
from tailseg.errors import UserError

TRIANGLE = "0.25 0.25 0.75 0.25 0.25 0.75"


def parse(text, classes=(0, 1), keypoint_numbers=0):
    """The objects and what was left out."""
    found = LeftOut()
    return parse_labels(text, "f.txt", classes, found, keypoint_numbers), found


# ---------------------------------------------------------------------------------------------------------
# Lines


def test_a_box_is_its_four_corners_and_edges_are_cut():
    ((label, corners, is_box),), found = parse("1 0.5 0.5 0.5 0.25\r\n\n")
    assert (label, is_box) == (1, True)
    assert corners.tolist() == [[0.25, 0.375], [0.75, 0.375], [0.75, 0.625], [0.25, 0.625]]
    assert not found.counts
    ((_, polygon, drawn),), found = parse(" 0 -0.005 0 1.009 0 1 1 ")
    assert (polygon.tolist(), drawn) == ([[0, 0], [1, 0], [1, 1]], False)
    assert not found.counts
    ((_, corners, _),), found = parse("0 0.1 0.5 0.4 1")
    assert corners.round(9).tolist() == [[0, 0], [0.3, 0], [0.3, 1], [0, 1]]
    assert found.notes() == [f"1 {REACHING} (f.txt: line 1)"]


@pytest.mark.parametrize("points", ["0.1 0.1 0.9 0.9", "0.9 0.9 0.925 0.9", "0.5 0.03 0.5 0.1"])
def test_four_numbers_beside_polygons_that_are_no_box_in_the_image_are_two_points(points):
    """Ultralytics writes and reads all lines of such a file as polygons, also those of two points."""
    lines, found = parse(f"0 {points}\n1 {TRIANGLE}")
    assert [(label, is_box) for label, _, is_box in lines] == [(1, False)]
    assert found.notes() == [f"1 {NO_SHAPE} (f.txt: line 1)"]
    assert [is_box for _, _, is_box in parse(f"0 {points}")[0]] == [True]  # in a file of boxes


def test_a_box_in_the_image_beside_polygons_is_one_and_counted():
    lines, found = parse(f"0 {TRIANGLE}\n1 0.25 0.5 0.515 0.25")  # beyond the image by rounding
    assert [(label, is_box) for label, _, is_box in lines] == [(0, False), (1, True)]
    assert lines[1][1].round(9).tolist() == [[0, 0.375], [0.5075, 0.375], [0.5075, 0.625], [0, 0.625]]
    assert found.notes() == [f"1 {BESIDE_POLYGONS} (f.txt: line 2)"]
    lines, found = parse("0 0.1 0.1 0.9 0.9\n1 0.5 0.5 0.5 0.5 0.1 0.1 1", keypoint_numbers=3)
    assert [is_box for _, _, is_box in lines] == [True, True]
    assert found.counts == {REACHING: 1}  # of the first line


@pytest.mark.parametrize("text", ["", " \n\r\n", "\t\n \t"])
def test_no_objects(text):
    assert parse(text)[0] == []


@pytest.mark.parametrize(
    "text",
    [f"1 {TRIANGLE}", f"1.0\t{TRIANGLE}  \t\r\n", f"\r\r  1 {TRIANGLE}\r", f"01 {TRIANGLE}\n", f"1e0 {TRIANGLE}"],
)
def test_spellings_of_a_line(text):
    ((label, polygon, is_box),), found = parse(text)
    assert (label, polygon.tolist(), is_box) == (1, [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75]], False)
    assert not found.counts


def test_lines_that_end_as_on_old_computers_are_lines():
    assert [label for label, _, _ in parse(f"0 {TRIANGLE}\r1 {TRIANGLE}\r0 {TRIANGLE}")[0]] == [0, 1, 0]


def test_equal_lines_are_kept_for_the_data_check_to_find():
    assert len(parse(f"0 {TRIANGLE}\n" * 3)[0]) == 3


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("cat " + TRIANGLE, NO_NUMBERS),
        ("0 0.1 0.2 0.3 0.4 0.5 nan", NO_NUMBERS),
        ("0 0.1 0.2 0.3 0.4 -inf inf", NO_NUMBERS),
        ("nan " + TRIANGLE, NO_NUMBERS),
        ("inf " + TRIANGLE, NO_NUMBERS),
        ("0," + TRIANGLE.replace(" ", ","), NO_NUMBERS),
        ("0, " + TRIANGLE.replace(" ", ", "), NO_NUMBERS),
        ("0", NO_SHAPE),
        ("0 0.1 0.2", NO_SHAPE),
        ("0 0.1 0.2 0.3", NO_SHAPE),
        ("0 0.1 0.2 0.3 0.4 0.5 0.6 1.7", NO_SHAPE),
        ("0 0.1 0.2 0.3 0.4 0.5", CONFIDENCE),
        ("0 0.1 0.2 0.3 0.4 1.0", CONFIDENCE),
        (f"0 {TRIANGLE} 0.75", CONFIDENCE),
        ("0 0.5 0.5 0 0.1 7", NO_SIZE),
        ("0 0.1 0.2 0.3 0.4 0.5 1.5", OUTSIDE),
        ("0 0.1 0.2 0.3 0.4 0.5 -0.02", OUTSIDE),
        ("0 320 240 100 50", OUTSIDE),
        ("0 1e300 1e300 0 0 1 1", OUTSIDE),
        ("0 0.5 0.5 0 0.1", NO_SIZE),
        ("0" + " 0.5" * 250_000, LONG_LINE),
        ("0 0.5 0.5 0.1 -0.005", NO_SIZE),
    ],
)
def test_one_odd_line_is_left_out(line, kind):
    lines, found = parse(f"1 {TRIANGLE}\n{line}\n0 {TRIANGLE}")
    assert [label for label, _, _ in lines] == [1, 0]
    assert found.counts == {kind: 1}
    assert found.notes() == [f"1 {kind} (f.txt: line 2)"]
    assert kind in CAUSES


@pytest.mark.parametrize(
    ("line", "classes", "sentence"),
    [
        ("2 " + TRIANGLE, (0, 1), "class 2 is not one of the 2 names; use 0 to 1"),
        ("0.5 " + TRIANGLE, (0, 1), "class 0.5 is not one of the 2 names; use 0 to 1"),
        ("-1 " + TRIANGLE, (0, 1), "class -1 is not one of the 2 names; use 0 to 1"),
        ("1e300 0.1", (0, 1), "class 1e+300 is not one of the 2 names; use 0 to 1"),
        ("0 " + TRIANGLE, (1, 2, 5), "class 0 is not one of the 3 names; use 1, 2, 5"),
        ("50 " + TRIANGLE, range(1, 13), "class 50 is not one of the 12 names; use 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, ..."),
        ("-1 " + TRIANGLE, None, "class -1 is not a number from 0 to 99999; check what the line begins with"),
    ],
)
def test_labels_and_names_that_contradict_are_refused(line, classes, sentence):
    with pytest.raises(UserError) as caught:
        parse(f"1 {TRIANGLE}\n{line}", classes)
    assert str(caught.value) == f"f.txt: line 2: {sentence}"


def test_without_names_any_number_is_a_class():
    assert [label for label, _, _ in parse(f"7 {TRIANGLE}\n0 {TRIANGLE}", None)[0]] == [7, 0]


def test_keypoints_are_no_polygon():
    lines, found = parse("1 0.5 0.5 0.5 0.25 0.5 0.5 2 0.6 0.6 1\n0 0.5 0.5 0.5 0.25\n", keypoint_numbers=6)
    assert [(label, polygon.tolist()[0], is_box) for label, polygon, is_box in lines] == [
        (1, [0.25, 0.375], True),
        (0, [0.25, 0.375], True),
    ]
    assert not found.counts


def test_a_track_id_after_a_box_polygon_or_keypoints_is_dropped():
    """CVAT: "Integer track id can be added to the end of any annotation"; its example has a box with the id 1."""
    lines, found = parse(f"0 0.3 0.8 0.1 0.3 1\n1 0.7 0.2 0.3 0.1\n1 0.5 0.5 0.2 1\n1 {TRIANGLE} 23\n0 {TRIANGLE}")
    assert [(label, is_box) for label, _, is_box in lines] == [(0, True), (1, True), (1, True), (1, False), (0, False)]
    assert lines[0][1].round(9).tolist() == [[0.25, 0.65], [0.35, 0.65], [0.35, 0.95], [0.25, 0.95]]
    assert lines[2][1].round(9).tolist() == [[0.4, 0], [0.6, 0], [0.6, 1], [0.4, 1]]  # the 1 is its height
    assert lines[3][1].tolist() == lines[4][1].tolist() == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75]]
    assert found.counts[TRACKED] == 2
    for points, dropped in (("0.5 0.5 2", 0), ("0.5 0.5 2 7", 1), ("7", 1)):
        lines, found = parse(f"1 0.5 0.5 0.5 0.25 {points}", keypoint_numbers=3)
        assert [(is_box, polygon.tolist()[0]) for _, polygon, is_box in lines] == [(True, [0.25, 0.375])]
        assert found.counts == ({TRACKED: 1} if dropped else {})


points = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=3, max_size=12)


@given(st.lists(st.tuples(st.integers(0, 1), points), max_size=5))
def test_lines_come_back_as_written(objects):
    text = "\n".join(f"{label} " + " ".join(f"{x!r} {y!r}" for x, y in polygon) for label, polygon in objects)
    lines, found = parse(text)
    assert [(label, [tuple(point) for point in polygon.tolist()]) for label, polygon, _ in lines] == objects
    assert not found.counts


@given(st.text(alphabet=st.sampled_from("0123456789.-+eE nainf\t\n\r_x\0\u2028é"), max_size=60) | st.text())
def test_any_text_is_read_or_refused_with_its_line(text):
    result, refused = attempt(parse, text, (0,))
    assert refused.startswith("f.txt: line ") or not refused
    lines, found = result or ([], LeftOut())
    assert all(((polygon >= 0) & (polygon <= 1)).all() and len(polygon) >= 3 for _, polygon, _ in lines)
    assert set(found.counts) <= {*CAUSES, TRACKED, BESIDE_POLYGONS, REACHING}
    if result:  # every line that is not blank is an object or is counted
        assert len(lines) + sum(found.counts.values()) == sum(bool(line.strip()) for line in text.splitlines())


# ---------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("images/a.jpg", "labels/a.txt"),
        ("images/train/deep/a.b.jpg", "labels/train/deep/a.b.txt"),
        ("train/images/a.jpg", "train/labels/a.txt"),
        ("Images/Train/a.jpg", "Labels/Train/a.TXT"),
        ("images/images/a.jpg", "images/labels/a.txt"),  # the last folder of that name
        ("train/a.jpg", "train/labels/a.txt"),
        ("train/a.jpg", "labels/train/a.txt"),
        ("train/deep/a.jpg", "train/labels/deep/a.txt"),
        ("train/a.jpg", "train/a.txt"),
        ("images/a.jpg", "images/a.txt"),
        ("a.jpg", "labels/a.txt"),
        ("a.jpg", "a.txt"),
        ("images/cafe\u0301.jpg", "labels/caf\u00e9.txt"),
        ("images/" + "n" * 250 + ".jpg", "labels/" + "n" * 250 + ".txt"),
    ],
)
def test_where_a_label_file_lies(tmp_path, image, label):
    write_files(tmp_path, {image: b"", label: ""})
    assert LabelFiles(tmp_path).find(tmp_path / image) == tmp_path / label


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("images/a.jpg", "images/b.jpg"),
        ("images/a.jpg", "labels/b.txt"),
        ("images/train/a.jpg", "labels/val/a.txt"),
        ("train/a.jpg", "labels/a.txt"),  # would be one label for the images of two splits
        ("images/a.jpg", "label/a.txt"),
    ],
)
def test_files_that_are_not_the_image_s_labels(tmp_path, image, label):
    write_files(tmp_path, {image: b"", label: ""})
    assert LabelFiles(tmp_path).find(tmp_path / image) is None


def test_labels_beside_images_come_last(tmp_path):
    write_files(tmp_path, {"images/a.jpg": b"", "images/b.jpg": b"", "images/a.txt": "", "images/b.txt": ""})
    write_files(tmp_path, {"labels/a.txt": ""})
    files = LabelFiles(tmp_path)
    assert files.find(tmp_path / "images/a.jpg") == tmp_path / "labels/a.txt"
    assert files.find(tmp_path / "images/b.jpg") == tmp_path / "images/b.txt"


def test_a_label_file_may_not_be_a_link_that_leads_out(tmp_path):
    root = write_files(tmp_path / "set", {"images/a.jpg": b"", "images/b.jpg": b"", "labels/b.txt": ""})
    write_files(tmp_path, {"private.txt": "secret"})
    os.symlink(tmp_path / "private.txt", root / "labels/a.txt")
    files = LabelFiles(root)
    with pytest.raises(UserError, match=r"a\.jpg: .*labels/a\.txt is a link that leads out of .*set; put the file"):
        files.find(root / "images/a.jpg")
    assert files.find(root / "images/b.jpg") == root / "labels/b.txt"


@pytest.mark.parametrize(
    ("others", "lone"),
    [
        ({}, []),
        ({"labels/train/b.txt": "", "labels/train/._b.txt": "", "labels/train/c.cache": "x"}, ["labels/train/b.txt"]),
        ({"labels/train/b.txt": f"0 {TRIANGLE}", "images/train/b.heic": b"x"}, ["labels/train/b.txt"]),
        ({"labels/train/b.TXT": "", "images/train/b.png": b""}, []),  # of another split's list
        ({"labels/train/deep/b.txt": ""}, ["labels/train/deep/b.txt"]),
        ({"labels/train/deep/b.txt": "", "images/train/deep/b.png": b""}, []),
        ({"labels/train/classes.txt": "0\n1", "labels/train/notes.txt": "by me", "labels/train/x.txt": b"\xff"}, []),
        ({"labels/val/b.txt": "", "labels/b.txt": ""}, []),  # not labels of these images
    ],
)
def test_label_files_without_an_image(tmp_path, others, lone):
    write_files(tmp_path, {"images/train/a.jpg": b"", "labels/train/a.txt": ""} | others)
    files = LabelFiles(tmp_path)
    files.find(tmp_path / "images/train/a.jpg")
    assert files.without_image([tmp_path / "images/train"]) == [tmp_path / name for name in lone]


def test_text_files_beside_images_count_where_labels_lie_there(tmp_path):
    write_files(tmp_path, {"a.jpg": b"", "b.jpg": b"", "README.txt": "hello", "c.txt": f"0 {TRIANGLE}", "d/e.txt": ""})
    files = LabelFiles(tmp_path)
    files.find(tmp_path / "b.jpg")
    assert files.without_image([tmp_path]) == []
    write_files(tmp_path, {"a.txt": ""})
    files = LabelFiles(tmp_path)
    files.find(tmp_path / "a.jpg")
    assert files.without_image([tmp_path]) == [tmp_path / "c.txt"]


def test_points_are_numbers_of_64_bits():
    ((_, polygon, _),), _ = parse(f"0 {TRIANGLE}")
    assert polygon.dtype == np.float64
