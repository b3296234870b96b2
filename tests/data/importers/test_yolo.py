import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from foreign_files import attempt, converted, fault, picture
from hypothesis import given
from hypothesis import strategies as st

from tailseg.data.importers.yolo import parse_labels, read_yolo
from tailseg.data.sources import open_source
from tailseg.errors import UserError

TRIANGLE = "0.25 0.25 0.75 0.25 0.25 0.75"


def yolo(root: Path, labels: dict[str, str], **changes) -> Path:
    """A YOLO set of images "train/1" etc. with the text of their label files."""
    for name, text in labels.items():
        picture(root / "images" / f"{name}.jpg")
        label = root / "labels" / f"{name}.txt"
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text(text)
    content = {"path": "../datasets/x", "train": "images/train", "val": "images/val", "names": {0: "cat", 1: "owl"}}
    (root / "data.yaml").write_text(yaml.safe_dump({k: v for k, v in (content | changes).items() if v is not None}))
    return root


def test_yolo_polygons_and_boxes_in_pixels(tmp_path):
    root = yolo(tmp_path / "src", {"train/1": f"1 {TRIANGLE}\n\n0 0.5 0.5 0.5 0.25\n", "val/1": f"0 {TRIANGLE}"})
    picture(root / "images" / "train" / "no-label.png")
    splits, notes = converted("yolo", root, tmp_path)
    train = splits.train
    assert [c.name for c in train.categories] == ["cat", "owl"]
    assert list(train.file_names) == ["train/1.jpg", "train/no-label.png"]
    assert train.labels.tolist() == [1, 0]
    assert train.boxes.tolist() == [[20, 10, 60, 30], [20, 15, 60, 25]]
    assert train.segmentation(0)[0].tolist() == [20, 10, 60, 10, 20, 30]
    assert train.areas[1] == 400
    assert abs(train.areas[0] - 400) < 40  # pixels of the triangle, whose exact area is 400
    assert any("1 objects have a box only" in note for note in notes)
    assert os.path.samefile(root / "images/val/1.jpg", tmp_path / "out/images/val/1.jpg")


def test_yolo_turned_photographs_count_as_they_are_shown(tmp_path):
    root = yolo(tmp_path / "src", {"train/1": f"0 {TRIANGLE}", "val/1": f"0 {TRIANGLE}"})
    picture(root / "images/train/1.jpg", orientation=6)
    splits, _ = converted("yolo", root, tmp_path)
    assert splits.train.image_sizes.tolist() == [[80, 40]]
    assert splits.train.boxes.tolist() == [[10, 20, 30, 60]]


def test_yolo_without_validation_is_divided(tmp_path):
    root = yolo(tmp_path / "src", {f"train/{i}": f"0 {TRIANGLE}" for i in range(10)}, val=None)
    splits, notes = converted("yolo", root, tmp_path)
    assert (len(splits.train), len(splits.val)) == (8, 2)
    assert any("no validation split" in note for note in notes)


def test_yolo_as_roboflow_lays_it_out(tmp_path):
    root = tmp_path / "src"
    for split in ("train", "valid"):
        picture(root / split / "images" / "a.jpg")
        (root / split / "labels").mkdir()
        (root / split / "labels" / "a.txt").write_text(f"0 {TRIANGLE}")
    (root / "data.yaml").write_text("train: ../train/images\nval: ../valid/images\nnc: 1\nnames: [cat]\n")
    splits, _ = converted("yolo", root, tmp_path)
    assert list(splits.val.file_names) == ["valid/a.jpg"]


def test_yolo_list_of_files(tmp_path):
    root = yolo(tmp_path / "src", {"train/1": f"0 {TRIANGLE}", "val/1": f"0 {TRIANGLE}"}, train="train.txt")
    (root / "train.txt").write_text("./images/train/1.jpg\n")
    assert len(converted("yolo", root, tmp_path)[0].train) == 1


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("0 0.1 0.2 0.3", "line 2: 3 numbers after the class"),
        ("0 0.1 0.2 0.3 0.4 0.5", "5 numbers after the class"),
        ("2 " + TRIANGLE, "class 2 is not one of the 2 names"),
        ("0.5 " + TRIANGLE, "class 0.5 is not"),
        ("-1 " + TRIANGLE, "class -1 is not"),
        ("cat " + TRIANGLE, "is not a row of numbers"),
        ("0 0.1 0.2 0.3 0.4 0.5 1.5", "1.5 is not between 0 and 1"),
        ("0 0.1 0.2 0.3 0.4 0.5 nan", "nan is not between 0 and 1"),
        ("inf " + TRIANGLE, "class inf is not"),
    ],
)
def test_yolo_bad_lines_name_file_and_line(tmp_path, line, problem):
    root = yolo(tmp_path / "src", {"train/1": f"0 {TRIANGLE}\n{line}\n", "val/1": ""})
    message = fault("yolo", root, tmp_path)
    assert message.startswith(f"{root / 'labels/train/1.txt'}: line 2: ")
    assert problem in message


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"names": None}, "'names' must be a list"),
        ({"names": ["cat", "cat"]}, "'cat' occurs more than once"),
        ({"train": None}, "the entry 'train' is missing"),
        ({"train": "images/other"}, "images/other is not in"),
        ({"train": "/etc"}, "/etc is not in"),
        ({"train": "../../../etc"}, "etc is not in"),
        ({"train": 3}, "must be a folder"),
        ({"train": "outside.txt"}, "leads out of"),
    ],
)
def test_yolo_bad_yaml(tmp_path, changes, problem):
    root = yolo(tmp_path / "src", {"train/1": f"0 {TRIANGLE}", "val/1": ""}, **changes)
    picture(tmp_path / "private.jpg")
    (root / "outside.txt").write_text("../private.jpg\n")
    assert problem in fault("yolo", root, tmp_path)


def test_yolo_links_that_lead_out_are_refused(tmp_path):
    root = yolo(tmp_path / "src", {"train/1": f"0 {TRIANGLE}", "val/1": ""})
    (root / "images/train/2.jpg").symlink_to(picture(tmp_path / "private.jpg"))
    assert "leads out of" in fault("yolo", root, tmp_path)


def test_yolo_images_without_any_label_are_a_mistake(tmp_path):
    root = yolo(tmp_path / "src", {"train/1": "", "val/1": ""})
    os.rename(root / "labels", root / "label")
    assert "no image has a label file" in fault("yolo", root, tmp_path)


points = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=3, max_size=12)


@given(st.lists(st.tuples(st.integers(0, 1), points), max_size=5))
def test_yolo_lines_come_back_as_written(objects):
    text = "\n".join(f"{label} " + " ".join(f"{x!r} {y!r}" for x, y in polygon) for label, polygon in objects)
    found = parse_labels(text, "f", ["cat", "owl"])
    assert [(label, [tuple(point) for point in polygon.tolist()]) for label, polygon, _ in found] == objects


@given(st.text(alphabet=st.sampled_from("0123456789.-+eE nainf\t\n\r_x"), max_size=60))
def test_yolo_any_text_is_read_or_refused_with_its_line(text):
    found, refused = attempt(parse_labels, text, "file.txt", ["cat"])
    assert refused.startswith("file.txt: line ") or not refused
    assert all(((polygon >= 0) & (polygon <= 1)).all() for _, polygon, _ in found or ())


def test_real_photographs_to_yolo_and_back(shared, tmp_path):
    """Objects of one polygon survive the way to normalised text and back."""
    source = shared / "data" / "coco128-lvis"
    theirs = open_source(str(source), show=False)
    root = tmp_path / "src"
    for split, part in (("train", theirs.train), ("val", theirs.val)):
        (root / "labels" / split).mkdir(parents=True)
        (root / "images" / split).mkdir(parents=True)
        for image in range(len(part)):
            path = part.image_path(image)
            (root / "images" / split / path.name).write_bytes(path.read_bytes())
            height, width = part.image_sizes[image].tolist()
            lines = []
            for row in part.rows(image).tolist():
                polygons = part.segmentation(row)
                if len(polygons) == 1:
                    flat = polygons[0].reshape(-1, 2).astype(float).clip(0, (width, height)) / (width, height)
                    lines.append(f"{part.labels[row]} " + " ".join(f"{value:.7f}" for value in flat.ravel()))
            (root / "labels" / split / f"{path.stem}.txt").write_text("\n".join(lines))
    names = [category.name for category in theirs.train.categories]
    (root / "data.yaml").write_text(yaml.safe_dump({"train": "images/train", "val": "images/val", "names": names}))
    ours, _ = converted("yolo", root, tmp_path)
    for before, after in ((theirs.train, ours.train), (theirs.val, ours.val)):
        single = [row for image in range(len(before)) for row in before.rows(image).tolist()]
        single = [row for row in single if len(before.segmentation(row)) == 1]
        by_name = {Path(name).name: image for image, name in enumerate(after.file_names)}
        rows = [r for image in range(len(before)) for r in after.rows(by_name[before.image_path(image).name]).tolist()]
        assert len(rows) == len(single) > 150
        assert before.labels[single].tolist() == after.labels[rows].tolist()
        assert np.abs(before.boxes[single] - after.boxes[rows]).max() < 1.5  # COCO's own boxes are off by up to a pixel
        for one, other in zip(single, rows, strict=True):
            assert np.abs(before.segmentation(one)[0] - after.segmentation(other)[0]).max() < 0.01


def test_a_box_is_its_four_corners_and_edges_are_cut():
    (label, corners, is_box), (_, polygon, drawn) = parse_labels(
        "1 0.5 0.5 0.5 0.25\r\n\n 0 -0.005 0 1.009 0 1 1 ", "f", ["a", "b"]
    )
    assert (label, is_box, drawn) == (1, True, False)
    assert corners.tolist() == [[0.25, 0.375], [0.75, 0.375], [0.75, 0.625], [0.25, 0.625]]
    assert polygon.tolist() == [[0, 0], [1, 0], [1, 1]]
    assert parse_labels("", "f", ["a"]) == parse_labels(" \n\r\n", "f", ["a"]) == []


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: [", "not valid YAML at line 1; write the entries train, val and names"),
        ("- a", "expected the entries train, val and names; check the file"),
        ("names: {0: a, 2: b}", "'names' must be a list of class names, or map 0, 1, 2, ... to them"),
        ("names: [a, 3]", "'names' must be a list of class names"),
        ("names: []", "'names' must be a list of class names"),
        ("names: [a]\ntrain: train.txt", "train has no images; check the folder it names"),
    ],
)
def test_a_yaml_file_at_fault(tmp_path, text, sentence):
    path = tmp_path / "mine.yml"  # the only one: it need not be called data.yaml
    path.write_text(text)
    (tmp_path / "train.txt").write_text("\n")
    with pytest.raises(UserError) as caught:
        read_yolo(tmp_path)
    assert str(caught.value).startswith(f"{path}: {sentence}")


def test_a_list_that_names_no_file(tmp_path):
    (tmp_path / "data.yaml").write_text("names: [a]\ntrain: [train.txt]")
    (tmp_path / "train.txt").write_text("\n./a.jpg\n")
    with pytest.raises(UserError, match=r"train\.txt: line 2: .*a\.jpg does not exist; put the image there or remove"):
        read_yolo(tmp_path)


def test_only_the_last_folder_called_images_holds_labels(tmp_path):
    root = tmp_path / "images" / "set"
    yolo(root, {"images/1": f"0 {TRIANGLE}", "val/1": ""}, train="images/images")
    os.makedirs(root / "images" / "labels")
    os.rename(root / "labels" / "images" / "1.txt", root / "images" / "labels" / "1.txt")
    assert len(read_yolo(root).parts["train"].annotations) == 1
