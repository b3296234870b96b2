import json
import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tailseg.data.importers.convert import convert
from tailseg.data.importers.labelme import parse_shape
from tailseg.data.importers.voc import parse_voc_object, parse_xml
from tailseg.data.importers.yolo import parse_labels
from tailseg.data.sources import open_source
from tailseg.errors import UserError

TRIANGLE = "0.25 0.25 0.75 0.25 0.25 0.75"


def picture(path: Path, size=(80, 40), orientation=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.new("RGB", size, (hash(path.name) % 255, 90, 10)).save(path, exif=exif)
    return path


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


def converted(kind, source, tmp_path):
    """The data set that a source becomes, as `train` reads it, and the notes."""
    before = {path: path.stat().st_mtime_ns for path in Path(source).rglob("*")}
    parts, notes = convert(kind, Path(source), tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in Path(source).rglob("*")} == before
    splits = open_source(str(tmp_path / "out"), show=False)
    assert len(parts["train"].images) == len(splits.train)
    return splits, notes


def fault(kind, source, tmp_path) -> str:
    with pytest.raises(UserError) as caught:
        convert(kind, Path(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    message = str(caught.value)
    assert "\n" not in message
    return message


def attempt(parser, *arguments):
    """What a parser returns, or None; and the sentence with which it refuses, or nothing."""
    try:
        return parser(*arguments), ""
    except UserError as error:
        return None, str(error)


# ---------------------------------------------------------------------------------------------------------
# YOLO


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
    assert splits.train.image_hws.tolist() == [[80, 40]]
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


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), points), max_size=5))
def test_yolo_lines_come_back_as_written(objects):
    text = "\n".join(f"{label} " + " ".join(f"{x!r} {y!r}" for x, y in polygon) for label, polygon in objects)
    found = parse_labels(text, "f", ["cat", "owl"])
    assert [(label, [tuple(point) for point in polygon.tolist()]) for label, polygon, _ in found] == objects


@settings(deadline=None)
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
            height, width = part.image_hws[image].tolist()
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


# ---------------------------------------------------------------------------------------------------------
# labelme


def labelme(root: Path, name: str, shapes, **changes) -> Path:
    picture(root / f"{name}.jpg")
    content = {
        "version": "5.4",
        "flags": {},
        "shapes": shapes,
        "imagePath": f"{Path(name).name}.jpg",
        "imageData": None,
    }
    content |= {"imageHeight": 40, "imageWidth": 80} | changes
    (root / f"{name}.json").write_text(json.dumps(content))
    return root


def shape(label="cat", points=((10, 10), (30, 10), (10, 30)), kind="polygon", group=None):
    return {"label": label, "points": [list(p) for p in points], "shape_type": kind, "group_id": group}


def test_labelme_polygons_rectangles_and_groups(tmp_path):
    root = tmp_path / "src"
    pieces = [shape("owl", group=1), shape(kind="rectangle", points=((30, 20), (5, 8))), shape("owl", group=1)]
    labelme(root, "train/a", [*pieces, shape("owl", group=2), shape("cat", group=1)])
    labelme(root, "val/a", [shape()])
    splits, _ = converted("labelme", root, tmp_path)
    assert [c.name for c in splits.train.categories] == ["cat", "owl"]
    assert splits.train.labels.tolist() == [1, 0, 1, 0]
    assert len(splits.train.segmentation(0)) == 2
    assert splits.train.boxes[1].tolist() == [5, 8, 30, 20]
    assert len(splits.val) == 1


@pytest.mark.parametrize(
    ("shapes", "changes", "problem"),
    [
        ([shape(), shape(kind="circle")], {}, "a.json: shape 2: it is a 'circle'"),
        ([shape(points=((1, 2), (3, 4)))], {}, "shape 1: a polygon needs at least 3 points"),
        ([shape(label="")], {}, "shape 1: it has no label"),
        ([{"label": "x", "points": [[1, "2"], [3, 4], [5, 6]]}], {}, "each [x, y]"),
        ([shape()], {"imagePath": "../../private.jpg"}, "leads out of"),
        ([shape()], {"imagePath": "b.jpg"}, "b.jpg does not exist"),
        ([shape()], {"imagePath": None}, "no 'imagePath'"),
        ([shape()], {"imageHeight": 41}, "it says 80 x 41 pixels"),
        ([], {}, "no file in it has an object"),
    ],
)
def test_labelme_faults_name_file_and_shape(tmp_path, shapes, changes, problem):
    picture(tmp_path / "private.jpg")
    assert problem in fault("labelme", labelme(tmp_path / "src", "a", shapes, **changes), tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "label": st.just("cat") | json_values,
            "points": st.lists(st.lists(st.floats(0, 9), min_size=2, max_size=2), max_size=4) | json_values,
            "shape_type": st.sampled_from(["polygon", "rectangle", "line"]) | json_values,
        },
    )
    | json_values
)
def test_labelme_any_shape_is_read_or_refused(value):
    found, refused = attempt(parse_shape, value, "place")
    if found is None:
        assert refused.startswith("place: ")
    else:
        name, polygon = found
        assert isinstance(name, str)
        assert polygon.shape[1] == 2
        assert len(polygon) >= 3
        assert np.isfinite(polygon).all()


# ---------------------------------------------------------------------------------------------------------
# Pascal VOC


def box(name="cat", xmin="11", ymin="11", xmax="30", ymax="20"):
    corners = f"<xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax>"
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    return f"<object><name>{name}</name>{part}<bndbox>{corners}</bndbox></object>"


def voc(root: Path, files: dict[str, str], lists=None) -> Path:
    (root / "Annotations").mkdir(parents=True)
    for name, objects in files.items():
        picture(root / "JPEGImages" / f"{name}.jpg")
        size = "<size><width>80</width><height>40</height><depth>3</depth></size>"
        text = f"<annotation><filename>{name}.jpg</filename>{size}{objects}</annotation>"
        (root / "Annotations" / f"{name}.xml").write_text(text)
    for split, names in (lists or {}).items():
        (root / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
        (root / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(names))
    return root


def test_voc_boxes_become_rectangles(tmp_path):
    files = {"a": box() + box("owl", "1", "1", "80", "40"), "b": box(), "unlisted": box("dog")}
    splits, notes = converted("voc", voc(tmp_path / "src", files, {"train": ["a"], "val": ["b 1"]}), tmp_path)
    assert splits.train.boxes.tolist() == [[10, 10, 30, 20], [0, 0, 80, 40]]
    assert splits.train.areas.tolist() == [200, 3200]
    assert list(splits.train.file_names) == ["a.jpg"]
    assert [c.name for c in splits.val.categories] == ["cat", "owl"]
    assert any("masks are rectangles" in note for note in notes)


@pytest.mark.parametrize(
    ("objects", "problem"),
    [
        (box(xmin="40"), "object 1: its bndbox needs"),
        (box() + box(ymax="x"), "object 2: its bndbox needs"),
        (box(xmax="nan"), "its bndbox needs"),
        (box(name=""), "object 1: it has no name"),
        ("<object>", "not valid XML"),
        ("<size><width>9</width></size><!DOCTYPE a>", "document type"),
    ],
)
def test_voc_faults_name_file_and_object(tmp_path, objects, problem):
    message = fault("voc", voc(tmp_path / "src", {"a": objects}), tmp_path)
    assert message.startswith(f"{tmp_path / 'src/Annotations/a.xml'}: ")
    assert problem in message


def test_voc_image_that_leads_out(tmp_path):
    root = voc(tmp_path / "src", {"a": box()})
    path = root / "Annotations/a.xml"
    picture(tmp_path / "private.jpg")
    path.write_text(path.read_text().replace("<filename>a.jpg", "<filename>../../private.jpg"))
    assert "leads out of" in fault("voc", root, tmp_path)
    assert "leads out of" in fault("voc", voc(tmp_path / "two", {"a": box()}, {"train": ["../../a"]}), tmp_path)


@settings(deadline=None)
@given(st.binary(max_size=80) | st.text(alphabet="<>/a&;!x= '", max_size=40).map(str.encode))
def test_voc_any_bytes_are_xml_or_refused(content):
    found, refused = attempt(parse_xml, content, "place")
    assert found is not None or refused.startswith("place: ")


@settings(deadline=None)
@given(*[st.integers(1, 50)] * 4)
def test_voc_corners(xmin, ymin, width, height):
    item = parse_xml(box("cat", xmin, ymin, xmin + width - 1, ymin + height - 1).encode(), "place")
    _, corners = parse_voc_object(item, "place")
    assert corners.min(axis=0).tolist() == [xmin - 1, ymin - 1]
    assert np.ptp(corners, axis=0).tolist() == [width, height]


# ---------------------------------------------------------------------------------------------------------
# COCO


def coco(root: Path, annotation_file: str, image_folder: str, numbers, name="cat") -> Path:
    rows, images = [], []
    for number in numbers:
        picture(root / image_folder / f"{number}.jpg")
        images.append({"id": number, "file_name": f"{number}.jpg", "height": 40, "width": 80})
        flat = [20, 10, 60, 10, 20, 30]
        rows.append({"id": number, "image_id": number, "category_id": 17, "bbox": [20, 10, 40, 20], "area": 400.0})
        rows[-1] |= {"segmentation": [flat], "iscrowd": 0}
    path = root / annotation_file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": rows, "categories": [{"id": 17, "name": name}]}))
    return root


@pytest.mark.parametrize(
    ("files", "folders"),
    [
        (("annotations/instances_train2017.json", "annotations/instances_val2017.json"), ("train2017", "val2017")),
        (("train/_annotations.coco.json", "valid/_annotations.coco.json"), ("train", "valid")),
        (("train.json", "val.json"), ("images", "images")),
    ],
)
def test_coco_layouts(tmp_path, files, folders):
    root = coco(coco(tmp_path / "src", files[0], folders[0], (1, 2)), files[1], folders[1], (3,))
    splits, _ = converted("coco", root, tmp_path)
    assert (len(splits.train), len(splits.val)) == (2, 1)
    assert splits.train.boxes.tolist() == [[20, 10, 60, 30]] * 2
    assert [(c.id, c.name, c.frequency) for c in splits.val.categories] == [(17, "cat", "r")]


def test_coco_splits_with_the_same_file_names_stay_apart(tmp_path):
    root = coco(coco(tmp_path / "src", "train.json", "train2017", (1,)), "val.json", "val2017", (1,))
    Image.new("RGB", (80, 40), "white").save(root / "val2017" / "1.jpg")
    splits, _ = converted("coco", root, tmp_path)
    assert splits.val.image_path(0).read_bytes() == (root / "val2017/1.jpg").read_bytes()
    assert splits.train.image_path(0).read_bytes() == (root / "train2017/1.jpg").read_bytes()


def test_coco_faults(tmp_path):
    root = coco(tmp_path / "src", "train.json", "images", range(4))
    (root / "images" / "2.jpg").unlink()
    assert "'2.jpg' is not in" in fault("coco", root, tmp_path)
    coco(root, "train2.json", "images", (1,))
    assert "train.json and train2.json both look like the train split" in fault("coco", root, tmp_path)
    assert "no annotation file with 'train'" in fault("coco", picture(tmp_path / "e" / "a.jpg").parent, tmp_path)
    assert "no such folder or file" in fault("coco", tmp_path / "nowhere", tmp_path)
    two = coco(coco(tmp_path / "two", "train.json", "images", (1,)), "val.json", "images", (2,), name="owl")
    assert "both files need the same categories" in fault("coco", two, tmp_path)


def test_out_must_be_new_and_source_may_be_on_a_system_without_links(tmp_path, monkeypatch):
    root = coco(tmp_path / "src", "train.json", "images", range(10))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(UserError, match="is not empty"):
        convert("coco", root, tmp_path / "full")

    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    _, notes = converted("coco", root, tmp_path)
    assert "images are copies" in notes
    assert (tmp_path / "out/images/3.jpg").read_bytes() == (root / "images/3.jpg").read_bytes()
    assert not os.path.samefile(tmp_path / "out/images/3.jpg", root / "images/3.jpg")
