import unicodedata
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import pytest
from foreign_files import attempt, converted, fault, picture
from hypothesis import given
from hypothesis import strategies as st

from tailseg.data.importers.shapes import OddObjectError
from tailseg.data.importers.voc import is_voc, parse_voc_object, read_voc
from tailseg.data.importers.xml_files import parse_xml
from tailseg.errors import UserError


def box(name="cat", xmin="11", ymin="11", xmax="30", ymax="20", more=""):
    corners = f"<xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax>"
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    return f"<object><name>{name}</name>{part}<bndbox>{corners}</bndbox>{more}</object>"


def outline(*points):
    pairs = "".join(f"<x{n}>{x}</x{n}><y{n}>{y}</y{n}>" for n, (x, y) in enumerate(points, start=1))
    return f"<polygon>{pairs}</polygon>"


def write(path: Path, objects=None, filename=None, size=(80, 40), more="") -> Path:
    """An annotation file; its image is not written."""
    stated = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    name = f"{path.stem}.jpg" if filename is None else escape(filename)
    content = f"<filename>{name}</filename>{more}{stated}{box() if objects is None else objects}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<annotation>{content}</annotation>")
    return path


def voc(root: Path, files: dict[str, str], lists=None) -> Path:
    for name, objects in files.items():
        picture(root / "JPEGImages" / f"{name}.jpg")
        write(root / "Annotations" / f"{name}.xml", objects)
    for split, names in (lists or {}).items():
        path = root / "ImageSets" / ("" if "/" in split else "Main") / f"{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(names))
    return root


def stems_of(found):
    return {split: sorted(path.stem for path in part.files) for split, part in found.parts.items()}


def item(text):
    return parse_xml(text.encode(), "place")


# ---------------------------------------------------------------------------------------------------------
# Objects


def test_boxes_become_rectangles(tmp_path):
    files = {"a": box() + box("owl", "1", "1", "80", "40"), "b": box(), "unlisted": box("dog")}
    splits, notes = converted("voc", voc(tmp_path / "src", files, {"train": ["a"], "val": ["b 1"]}), tmp_path)
    assert splits.train.boxes.tolist() == [[10, 10, 30, 20], [0, 0, 80, 40]]
    assert splits.train.areas.tolist() == [200, 3200]
    assert list(splits.train.file_names) == ["a.jpg"]
    assert [c.name for c in splits.val.categories] == ["cat", "owl"]
    assert any("masks are rectangles" in note for note in notes)
    unlisted = tmp_path / "src" / "Annotations" / "unlisted.xml"
    assert f"1 annotation files in neither the training nor the validation split: left out ({unlisted})" in notes


@given(*[st.integers(1, 50)] * 4)
def test_corners(xmin, ymin, width, height):
    _, corners = parse_voc_object(item(box("cat", xmin, ymin, xmin + width - 1, ymin + height - 1)))
    assert corners.min(axis=0).tolist() == [xmin - 1, ymin - 1]
    assert np.ptp(corners, axis=0).tolist() == [width, height]


def test_polygons_are_taken_before_boxes(tmp_path):
    """As Roboflow and supervision write them; their points count from 1, too."""
    triangle = outline((11, 11), (31, 11), (11, 31))
    files = {"a": box(more=triangle) + box("owl"), "b": box(more="<polygon><pt><x>1</x></pt></polygon>")}
    found = read_voc(voc(tmp_path, files))
    rows = found.parts["train"].annotations
    assert rows[0]["segmentation"] == [[10, 10, 30, 10, 10, 30]]
    assert [row["bbox"] for row in rows] == [[10, 10, 20, 20], [10, 10, 20, 10], [10, 10, 20, 10]]
    assert "2 objects have a box only: their masks are rectangles" in found.notes


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (box(name=""), "without a label"),
        (box(name="  "), "without a label"),
        ("<object><name>cat</name></object>", "without a box of four numbers"),
        (box(ymax="x"), "without a box of four numbers"),
        (box(xmax="nan"), "without a box of four numbers"),
        (box(xmax="inf"), "not numbers"),
        (box(xmin="40"), "xmin > xmax"),
        (box(ymin="21"), "ymin > ymax"),
        (box(xmax="65536"), "beyond 65,535 pixels"),
        (box(more=outline((1, 1), (2, 2))), "too few points"),
        (box(more=outline((1, 1), (2, 2), (3, "x"))), "not numbers"),
        (box(more="<polygon><x1>1</x1><x2>2</x2><x3>3</x3></polygon>"), "not numbers"),
    ],
)
def test_an_odd_object_says_its_kind(text, kind):
    with pytest.raises(OddObjectError, match=kind):
        parse_voc_object(item(text))


def test_one_odd_object_does_not_refuse_the_set(tmp_path):
    """The last one lies outside of its image of 80 x 40."""
    objects = box() + box(ymax="x") + box("5", "1", "1", "9", "9") + box("owl", "90", "1", "99", "9")
    found = read_voc(voc(tmp_path, {"a": objects}))
    assert [row["name"] for row in found.categories] == ["5", "cat", "owl"]
    assert [row["category_id"] for row in found.parts["train"].annotations] == [2, 1]
    path = tmp_path / "Annotations" / "a.xml"
    assert found.notes[0] == f"1 objects without a box of four numbers: left out ({path}: object 2)"
    assert found.notes[1].startswith("1 objects without extent in their image: left out")


@given(st.recursive(st.text(alphabet="1.-x ", max_size=4), lambda inner: st.lists(inner, max_size=4), max_leaves=6))
def test_any_object_is_read_or_refused(value):
    tags = iter(["name", "bndbox", "xmin", "ymin", "xmax", "ymax", "polygon", "x1", "y1"] * 20)

    def text(value):
        inner = value if isinstance(value, str) else "".join(map(text, value))
        tag = next(tags)
        return f"<{tag}>{inner}</{tag}>"

    found, refused = attempt(parse_voc_object, item(f"<object>{text(value)}</object>"))
    assert found is not None or refused.endswith(": left out")


boxes = st.tuples(
    st.sampled_from(["cat", "owl", "two words"]),
    st.integers(1, 70),
    st.integers(1, 30),
    st.integers(1, 10),
    st.integers(1, 10),
)


@given(st.lists(boxes, max_size=5))
def test_random_sets_come_back(tmp_path_factory, objects):
    root = tmp_path_factory.mktemp("sets")
    text = "".join(box(name, x, y, x + w - 1, y + h - 1) for name, x, y, w, h in objects) + box("dog")
    found = read_voc(voc(root, {"a": text}))
    names = {row["id"]: row["name"] for row in found.categories}
    rows = found.parts["train"].annotations
    assert [(names[row["category_id"]], *row["bbox"]) for row in rows][:-1] == [
        (name, x - 1, y - 1, w, h) for name, x, y, w, h in objects
    ]
    assert [row["area"] for row in rows][:-1] == [w * h for _, _, _, w, h in objects]


# ---------------------------------------------------------------------------------------------------------
# Images


@pytest.mark.parametrize(
    ("annotation", "image", "filename", "path"),
    [
        ("Annotations/a.xml", "JPEGImages/a.jpg", "a.jpg", ""),
        ("Annotations/a.xml", "images/b.png", "b.png", ""),
        ("Annotations/a.xml", "Annotations/a.jpg", "a.jpg", ""),
        ("Annotations/a.xml", "pics/p0.jpg", "../pics/p0.jpg", ""),
        ("Annotations/a.xml", "pics/p0.jpg", "..\\pics\\p0.jpg", ""),
        ("Annotations/a.xml", "JPEGImages/a.JPG", "a.jpg", ""),
        ("Annotations/a.xml", "JPEGImages/a.webp", "a", ""),  # without suffix
        ("Annotations/a.xml", "JPEGImages/a.bmp", "old name.jpg", ""),  # by the file's own name
        ("Annotations/a.xml", "JPEGImages/b.jpg", "", "C:\\data\\b.jpg"),  # labelImg states a path
        ("Annotations/cam/a.xml", "JPEGImages/cam/a.jpg", "a.jpg", ""),
        ("Annotations/cam/a.xml", "JPEGImages/cam/a.jpg", "cam/a.jpg", ""),
        ("VOC2012/Annotations/a.xml", "VOC2012/JPEGImages/a.jpg", "a.jpg", ""),
        ("annotations/a.xml", "images/a.jpg", "a.jpg", ""),
        ("labels/a.xml", "photos/a.jpg", "a.jpg", ""),  # the only one of this name
        ("a.xml", "a.jpg", "../../etc/a.jpg", ""),
    ],
)
def test_where_images_are_found(tmp_path, annotation, image, filename, path):
    write(tmp_path / annotation, filename=filename, more=f"<path>{path}</path>")
    picture(tmp_path / image)
    assert read_voc(tmp_path).parts["train"].files == [tmp_path / image]


def test_names_in_another_unicode_form(tmp_path):
    name = unicodedata.normalize("NFD", "café.jpg")
    picture(tmp_path / "JPEGImages" / name)
    write(tmp_path / "Annotations" / "1.xml", filename=unicodedata.normalize("NFC", name))
    assert read_voc(tmp_path).parts["train"].files == [tmp_path / "JPEGImages" / name]


def test_an_image_outside_is_not_there(tmp_path):
    picture(tmp_path / "private.jpg")
    write(tmp_path / "src" / "Annotations" / "a.xml", filename="../../private.jpg")
    message = fault("voc", tmp_path / "src", tmp_path)
    assert message == (
        f"{tmp_path}/src/Annotations/a.xml: its image '../../private.jpg' is not in {tmp_path}/src; "
        "put it into JPEGImages, images or beside the file, or give the folder that holds both"
    )


def test_xml_beside_its_images(tmp_path):
    for split, name in (("train", "a"), ("valid", "b"), ("test", "c")):  # as Roboflow writes them
        picture(tmp_path / split / f"{name}.png")
        (tmp_path / split / f"{name}.xml").write_text(f"<annotation>{box()}</annotation>")  # says neither name nor size
    found = read_voc(tmp_path)
    assert {split: part.files for split, part in found.parts.items()} == {
        "train": [tmp_path / "train" / "a.png"],
        "val": [tmp_path / "valid" / "b.png"],
    }
    assert [note for note in found.notes if "neither" in note] == [
        f"1 annotation files in neither the training nor the validation split: left out ({tmp_path / 'test' / 'c.xml'})"
    ]


def test_images_and_files_without_each_other_are_counted(tmp_path):
    root = voc(tmp_path, dict.fromkeys(("a", "b", "c", "d"), box()) | {"empty": ""})
    folder = root / "Annotations"
    write(folder / "lost.xml")
    write(folder / "again.xml", filename="a.jpg")
    write(folder / "d.xml", size=(81, 40))
    (folder / "cut.xml").write_text("<annotation><object>")
    (folder / "other.xml").write_text("<annotations/>")
    picture(root / "JPEGImages" / "unlabelled.jpg")
    picture(root / "SegmentationObject" / "a.png")
    found = read_voc(root)
    assert stems_of(found) == {"train": ["a", "b", "c", "empty"]}
    assert found.notes == [
        f"1 XML files that are not Pascal VOC's: left out ({folder}/other.xml)",
        "1 annotation files that state another size than their image has: left out "
        f"({folder}/d.xml: it says 81 x 40 pixels but {root}/JPEGImages/d.jpg has 80 x 40)",
        f"1 annotation files for an image that is used already: left out ({folder}/again.xml)",
        "1 XML files that cannot be read: left out "
        f"({folder}/cut.xml: not valid XML: no element found: line 1, column 20)",
        f"1 annotation files without image: left out ({folder}/lost.xml: its image 'lost.jpg' is not in {root})",
        f"1 images without an object: kept, as images that show none of the classes ({root}/JPEGImages/empty.jpg)",
        f"1 images without annotation: left out ({root}/JPEGImages/unlabelled.jpg)",
        "Pascal VOC has boxes only: the masks are rectangles, so mask AP means box AP",
        f"{root}/SegmentationObject has masks of 1 images, which are not read: export COCO to have them",
    ]


def test_masks_of_a_year_in_a_devkit_are_no_photographs(tmp_path):
    year = voc(tmp_path / "VOC2012", {"a": box(), "b": box()})
    write(year / "Annotations" / "lost.xml")
    for name in ("a", "b", "lost"):
        picture(year / "SegmentationObject" / f"{name}.png")
        picture(year / "SegmentationClass" / f"{name}.png")
    found = read_voc(tmp_path)
    assert stems_of(found) == {"train": ["a", "b"]}
    lost = f"{year}/Annotations/lost.xml: its image 'lost.jpg' is not in {tmp_path}"
    assert found.notes == [
        f"1 annotation files without image: left out ({lost})",
        "Pascal VOC has boxes only: the masks are rectangles, so mask AP means box AP",
        f"{year}/SegmentationObject has masks of 3 images, which are not read: export COCO to have them",
    ]


def test_difficult_objects_are_objects_and_counted(tmp_path):
    flags = [f"<difficult>{flag}</difficult>" for flag in ("1", " 1 ", "0", "")]
    root = voc(tmp_path, {"a": "".join(box(more=flag) for flag in flags)})
    found = read_voc(root)
    assert len(found.parts["train"].annotations) == 4
    path = root / "Annotations" / "a.xml"
    assert found.notes[0] == (
        f"2 objects marked as difficult: taken as all others ({path}: object 1, {path}: object 2)"
    )


@pytest.mark.parametrize(
    ("objects", "problem"),
    [
        ("<object>", "not valid XML"),
        ("<size><width>9</width></size><!DOCTYPE a>", "not valid XML"),
    ],
)
def test_files_at_fault_are_named(tmp_path, objects, problem):
    message = fault("voc", voc(tmp_path / "src", {"a": objects}), tmp_path)
    assert message.startswith(f"{tmp_path / 'src/Annotations/a.xml'}: {problem}")


def test_a_document_type_is_refused(tmp_path):
    path = voc(tmp_path, {"a": box()}) / "Annotations" / "a.xml"
    path.write_text('<?xml version="1.0"?><!DOCTYPE annotation [<!ENTITY x "y">]>\n' + path.read_text())
    with pytest.raises(UserError, match=rf"^{path}: it declares a document type; remove the line with <!DOCTYPE"):
        read_voc(tmp_path)


@pytest.mark.parametrize("size", [(0, 40), ("x", 40), ("", "")])
def test_a_size_may_be_unknown(tmp_path, size):
    picture(tmp_path / "a.jpg")
    write(tmp_path / "a.xml", size=size)
    assert read_voc(tmp_path).parts["train"].images[0]["width"] == 80


def test_a_size_that_is_not_the_images(tmp_path):
    picture(tmp_path / "a.jpg")
    write(tmp_path / "a.xml", size=(81, 40))
    with pytest.raises(UserError, match=r"a\.xml: it says 81 x 40 pixels but .* has 80 x 40"):
        read_voc(tmp_path)


def test_folders_without_annotations_or_images(tmp_path):
    with pytest.raises(UserError, match=rf"^{tmp_path}: there is no XML file in it; give the folder that holds"):
        read_voc(tmp_path)
    path = write(tmp_path / "Annotations" / "a.xml")
    with pytest.raises(UserError, match=r"a\.xml: Pascal VOC has one file for each image; give the folder"):
        read_voc(path)
    picture(tmp_path / "a.jpg")
    write(path, "")
    with pytest.raises(UserError, match="no file in it has an object; check the folder"):
        read_voc(tmp_path)


# ---------------------------------------------------------------------------------------------------------
# Lists


def test_without_lists_all_annotations_are_for_training(tmp_path):
    found = read_voc(voc(tmp_path, {"a": box(), "b": box("owl")}))
    assert [len(part.images) for part in found.parts.values()] == [2]
    assert [row["name"] for row in found.categories] == ["cat", "owl"]


@pytest.mark.parametrize(
    ("lists", "train", "val"),
    [
        ({"train": ["a", "b"], "val": ["c"]}, "ab", "c"),
        ({"Train": ["a"], "Validation": ["b", "c", "d"]}, "a", "bcd"),  # the subsets of CVAT and Datumaro
        ({"trainval": ["a", "b"], "test": ["c", "d"]}, "ab", ""),
        ({"train": ["a", "b"], "trainval": ["a", "b", "c"]}, "ab", "c"),
        ({"train": ["a", "b"], "val": ["c"], "trainval": ["d"]}, "ab", "c"),
        ({"train": ["a"], "cat_train": ["b -1", "c 1"], "train_val": ["d"]}, "a", ""),  # of the classes cat and train
        ({"val": ["a"], "default": ["b"]}, "bcd", "a"),
        ({"default": ["a"]}, "abcd", ""),
        ({"Segmentation/train": ["a"], "Segmentation/val": ["b"]}, "a", "b"),
        ({"Main/train": ["c"], "Segmentation/train": ["a"]}, "c", ""),
        ({"train": ["a.jpg", "JPEGImages/b.jpg", "Annotations\\c.xml", '"d"', ""], "val": []}, "abcd", ""),
        ({"train": ["a  1", "/home/x/b.jpg", "c -1"]}, "abc", ""),
    ],
)
def test_lists_tell_splits(tmp_path, lists, train, val):
    found = read_voc(voc(tmp_path, dict.fromkeys("abcd", box()), lists))
    assert stems_of(found) == {"train": list(train)} | ({"val": list(val)} if val else {})


def test_lists_beside_the_folders(tmp_path):
    root = voc(tmp_path, dict.fromkeys("abc", box()))
    (root / "train.txt").write_text("./JPEGImages/a.jpg ./Annotations/a.xml\nJPEGImages/b.jpg Annotations/b.xml\n")
    (root / "valid.txt").write_text("JPEGImages/c.jpg\tAnnotations/c.xml\n")
    (root / "test.txt").write_text("Notes on tests.\n")
    (root / "label_list.txt").write_text("cat\n")
    assert stems_of(read_voc(root)) == {"train": ["a", "b"], "val": ["c"]}
    (root / "ImageSets").mkdir()
    (root / "ImageSets/train.txt").write_text("a\n")
    (root / "ImageSets/val.txt").write_text("b\nc\n")
    assert stems_of(read_voc(root)) == {"train": ["a"], "val": ["b", "c"]}


def test_names_with_spaces_dots_and_folders(tmp_path):
    names = ["my photo 1", "v1.2", "cam/a", "b"]
    root = voc(tmp_path, dict.fromkeys(names, box()), {"train": ['"my photo 1"', "v1.2", "cam/a"], "val": ["b"]})
    assert stems_of(read_voc(root)) == {"train": ["a", "my photo 1", "v1.2"], "val": ["b"]}


def test_names_of_no_file_or_of_both_lists_are_counted(tmp_path):
    root = voc(tmp_path, dict.fromkeys("abc", box()), {"train": ["a", "gone", "b"], "val": ["c", "a", "../../etc/x"]})
    found = read_voc(root)
    assert stems_of(found) == {"train": ["a", "b"], "val": ["c"]}
    lists = root / "ImageSets" / "Main"
    assert found.notes[:2] == [
        f"2 names in a list without annotation file: left out ({lists}/train.txt: line 2, {lists}/val.txt: line 3)",
        f"1 names in both lists: kept for training only ({lists}/val.txt: line 2)",
    ]


def test_several_years_each_with_its_lists(tmp_path):
    for year, split in (("VOC2007", "train"), ("VOC2012", "val")):
        voc(tmp_path / year, {"a": box(), f"of {year}": box()}, {split: ["a"], "test": [f"of {year}"]})
    found = read_voc(tmp_path)
    assert {split: [row["file_name"] for row in part.images] for split, part in found.parts.items()} == {
        "train": ["VOC2007/a.jpg"],
        "val": ["VOC2012/a.jpg"],
    }


def test_files_of_voc_are_told_by_their_root(tmp_path):
    path = tmp_path / "a.xml"
    for text, own in (
        ("<annotation/>", True),
        ("<annotation verified='no'>", True),
        ("<annotations>", False),
        ("", False),
    ):
        path.write_text(text)
        assert is_voc(path) is own


def test_files_and_images_of_one_name_belong_together(tmp_path):
    """Whatever the file states: it was copied from another, or renamed."""
    root = voc(tmp_path, {"a": box("cat"), "b": box("dog")})
    write(root / "Annotations/b.xml", box("owl"), filename="a.jpg")
    write(root / "Annotations/a copy.xml", box("wrong"), filename="a.jpg")
    found = read_voc(root)
    names = {row["id"]: row["name"] for row in found.categories}
    part = found.parts["train"]
    files = {row["id"]: path.name for row, path in zip(part.images, part.files, strict=True)}
    assert [(files[row["image_id"]], names[row["category_id"]]) for row in part.annotations] == [
        ("a.jpg", "cat"),
        ("b.jpg", "owl"),
    ]
    assert found.notes[0] == (
        f"1 annotation files for an image that is used already: left out ({root}/Annotations/a copy.xml)"
    )


def test_folders_of_other_names_that_mirror_each_other(tmp_path):
    for split in ("train", "val"):  # as on Kaggle; and as in ImageNet, where names have no suffix
        picture(tmp_path / "one" / split / "images" / "1.jpg")
        write(tmp_path / "one" / split / "xmls" / "1.xml")
        picture(tmp_path / "two" / "Data" / split / "1.JPEG")
        write(tmp_path / "two" / "Annotations" / split / "1.xml", filename="1")
    for root, folder in ((tmp_path / "one", "{}/images/1.jpg"), (tmp_path / "two", "Data/{}/1.JPEG")):
        found = read_voc(root)
        assert {split: part.files for split, part in found.parts.items()} == {
            split: [root / folder.format(split)] for split in ("train", "val")
        }


def test_images_of_the_test_list_are_counted_once(tmp_path):
    root = voc(tmp_path, dict.fromkeys("abc", box()), {"train": ["a"], "val": ["b"], "test": ["c"]})
    assert [note for note in read_voc(root).notes if "left out" in note] == [
        f"1 annotation files in neither the training nor the validation split: left out ({root}/Annotations/c.xml)"
    ]


def test_files_in_gbk_with_a_namespace(tmp_path):
    root = voc(tmp_path, {"a": box("行人")})
    path = root / "Annotations/a.xml"
    text = path.read_text().replace("<annotation>", "<annotation xmlns='http://x.org'>")
    path.write_bytes(f'<?xml version="1.0" encoding="GBK"?>{text}'.encode("gbk"))
    assert [row["name"] for row in read_voc(root).categories] == ["行人"]
