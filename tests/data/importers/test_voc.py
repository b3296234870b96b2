from pathlib import Path

import numpy as np
import pytest
from foreign_files import attempt, converted, fault, picture
from hypothesis import given
from hypothesis import strategies as st

from tailseg.data.importers.voc import parse_voc_object, parse_xml, read_voc
from tailseg.errors import UserError


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


@given(st.binary(max_size=80) | st.text(alphabet="<>/a&;!x= '", max_size=40).map(str.encode))
def test_voc_any_bytes_are_xml_or_refused(content):
    found, refused = attempt(parse_xml, content, "place")
    assert found is not None or refused.startswith("place: ")


@given(*[st.integers(1, 50)] * 4)
def test_voc_corners(xmin, ymin, width, height):
    item = parse_xml(box("cat", xmin, ymin, xmin + width - 1, ymin + height - 1).encode(), "place")
    _, corners = parse_voc_object(item, "place")
    assert corners.min(axis=0).tolist() == [xmin - 1, ymin - 1]
    assert np.ptp(corners, axis=0).tolist() == [width, height]


def test_xml_beside_its_images(tmp_path):
    for split, name in (("train", "a"), ("val", "b")):
        picture(tmp_path / split / f"{name}.png")
        (tmp_path / split / f"{name}.xml").write_text(f"<annotation>{box()}</annotation>")  # says neither name nor size
    found = read_voc(tmp_path)
    assert {split: part.files for split, part in found.parts.items()} == {
        "train": [tmp_path / "train" / "a.png"],
        "val": [tmp_path / "val" / "b.png"],
    }


def test_without_lists_all_annotations_are_for_training(tmp_path):
    found = read_voc(voc(tmp_path, {"a": box(), "b": box("owl")}))
    assert [len(part.images) for part in found.parts.values()] == [2]
    assert [row["name"] for row in found.categories] == ["cat", "owl"]


def test_folders_without_annotations_or_images(tmp_path):
    with pytest.raises(UserError, match=rf"^{tmp_path}: there is no annotation \(.xml\) in it; check the folder"):
        read_voc(tmp_path)
    (voc(tmp_path, {"a": box()}) / "JPEGImages" / "a.jpg").unlink()
    with pytest.raises(UserError, match=r"a\.xml: its image 'a\.jpg' is not in JPEGImages or beside it; put it there"):
        read_voc(tmp_path)


def test_a_size_that_is_not_the_images(tmp_path):
    path = voc(tmp_path, {"a": box()}) / "Annotations" / "a.xml"
    path.write_text(path.read_text().replace("<width>80", "<width>81"))
    with pytest.raises(UserError, match=r"a\.xml: it says 81 x 40 pixels but .* has 80 x 40"):
        read_voc(tmp_path)
    path.write_text(path.read_text().replace("<width>81", "<width>0"))  # stands for: not known
    assert read_voc(tmp_path).parts["train"].images[0]["width"] == 80
