import json
import os

import pytest
from foreign_files import attempt, coco_set, converted, fault, write_files

from tailseg.cli.data import FORMATS
from tailseg.data.importers.convert import (
    NAMES,
    READERS,
    convert,
    image_note,
    only_train_note,
    read_set,
    recognise,
    unrecognised,
)
from tailseg.errors import UserError

LABELME = '{"version": "5", "shapes": [], "imagePath": "a.jpg"}'
VIA = '{"_via_settings": {}, "_via_img_metadata": {}}'
SUPERVISELY = '{"tags": [], "size": {"height": 40, "width": 80}, "objects": []}'
YOLO = {"images/1.jpg": None, "labels/1.txt": "0 0.5 0.5 0.5 0.5"}
IN_A_FOLDER = {f"YOLODataset/{name}": content for name, content in YOLO.items()}


def test_out_must_be_new_and_source_may_be_on_a_system_without_links(tmp_path, monkeypatch):
    root = coco_set(tmp_path / "src", "train.json", "images", range(10))
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


def test_notes_tell_what_became_of_images_and_classes():
    assert image_note(True) == "images are hard links to the source's files"
    assert image_note(False) == "images are copies"
    assert only_train_note([]) == []
    assert only_train_note(["a", "b"]) == ["2 classes could not reach validation: a, b"]
    (note,) = only_train_note([str(i) for i in range(11)])
    assert note == "11 classes could not reach validation: 0, 1, 2, 3, 4, 5, 6, 7 and 3 more"


def test_a_source_without_validation_says_what_could_not_be_divided(tmp_path):
    root = coco_set(tmp_path / "src", "train.json", "images", range(10))
    content = json.loads((root / "train.json").read_text())
    content["categories"].append({"id": 20, "name": "owl"})
    content["annotations"][4]["category_id"] = 20
    (root / "train.json").write_text(json.dumps(content))
    splits, notes = converted("coco", root, tmp_path)
    assert (len(splits.train), len(splits.val)) == (8, 2)
    assert "the source has no validation split: a fifth of the images was set aside, rare classes first" in notes
    assert "1 classes could not reach validation: owl" in notes


def test_a_source_too_small_to_be_divided_says_what_was_left_out(tmp_path):
    shape = {"label": "cat", "points": [[1, 1], [20, 1], [9, 9]], "shape_type": "polygon"}
    text = json.dumps({"version": "5.0.1", "shapes": [shape], "imagePath": "a.jpg"})
    root = write_files(tmp_path / "src", {"a.jpg": None, "a.json": text, "b.json": text})
    message = fault("labelme", root, tmp_path)
    assert "none of its 1 images can be spared for validation" in message
    assert message.endswith(f"(1 annotation files for an image that is used already: left out ({root}/b.json))")


def test_splits_of_which_no_image_can_be_used(tmp_path):
    line = "0 0.5 0.5 0.5 0.5"
    files = {f"images/train/{i}.jpg": None for i in range(5)} | {"images/val/5.jpg": b"no image"}
    files |= {f"labels/{'val' if i == 5 else 'train'}/{i}.txt": line for i in range(6)}
    root = write_files(tmp_path / "src", files | {"classes.txt": "cat"})
    splits, notes = converted("yolo", root, tmp_path)
    assert (len(splits.train), len(splits.val)) == (4, 1)
    assert notes[:3] == [
        f"1 images that cannot be read: left out with their labels ({root}/images/val/5.jpg)",
        "5 objects have a box only: their masks are rectangles",
        "no validation image can be used: the set counts as one without a validation split",
    ]


def test_a_training_split_that_validation_has_used_up(tmp_path):
    meta = "<annotations><version>1.1</version>"
    polygon = '<polygon label="cat" points="1,1;20,1;9,9"/>'
    entry = '<image id="1" name="{}" subset="{}" width="80" height="40">' + polygon + "</image>"
    entries = [entry.format(name, split) for name, split in (("a.jpg", "train"), ("a.jpg", "val"), ("b.jpg", "train"))]
    root = write_files(tmp_path / "src", {"a.jpg": None, "b.jpg": None})
    write_files(root, {"annotations.xml": f"{meta}{''.join(entries)}</annotations>"})
    _, notes = converted("cvat", root, tmp_path)
    assert "no validation image can be used: the set counts as one without a validation split" in notes
    write_files(root, {"b.jpg": b"no image", "a.jpg": b"no image", "c.jpg": None, "d.jpg": None})
    entries += [entry.format(name, "val") for name in ("c.jpg", "d.jpg")]
    write_files(root, {"annotations.xml": f"{meta}{''.join(entries[2:])}</annotations>"})
    message = fault("cvat", root, tmp_path / "again")
    assert message.startswith(f"{root}: no training image can be used (1 image entries whose image cannot be read: ")


def test_every_image_is_reported(tmp_path):
    done = []
    convert("coco", coco_set(tmp_path / "src", "a.json", "images", range(5)), tmp_path / "out", progress=done.append)
    assert done == [1, 2, 3, 4, 5] * 2  # read, then written


@pytest.mark.parametrize("kind", READERS)
def test_archives_are_answered_with_extracting_them(tmp_path, kind):
    """Most labelling tools hand out an archive; nothing in it is opened."""
    folder = write_files(tmp_path / "src", {"task_1.ZIP": b"PK", "task_2.zip": b"PK", ".x.zip": b""})
    assert fault(kind, folder, tmp_path) == (
        f"{folder}: there is no data set in it, but task_1.ZIP may hold one; extract that"
    )
    file = folder / "task_1.ZIP"
    assert fault(kind, file, tmp_path) == f"{file}: it is an archive; extract it and give the folder that it makes"


def test_an_archive_beside_a_data_set_is_no_matter(tmp_path):
    root = coco_set(tmp_path / "src", "train.json", "gone", range(1))
    write_files(root, {"images.zip": b""})
    (root / "gone/0.jpg").unlink()
    assert "0.jpg" in fault("coco", root, tmp_path)  # the reader's own sentence


def test_what_is_no_data_set_is_answered_with_what_is_one(tmp_path):
    sentence = str(unrecognised(tmp_path))
    assert sentence.startswith(f"{tmp_path}: there is no data set in it; give a folder with train.json, val.json and")
    assert all(name in sentence for name in NAMES.values())


@pytest.mark.parametrize(
    ("files", "given", "kind"),
    [
        ({"a.json": LABELME}, "a.json", "labelme"),
        ({"a.xml": "<annotation/>"}, "a.xml", "voc"),
        ({"a.json": '{"images": []}'}, "a.json", "coco"),
        ({"a.xml": "<annotations><version>1.1</version></annotations>"}, "a.xml", "cvat"),
        ({"a.json": '{"images": 1}', "a.xml": "<a/>"}, "", None),
        (YOLO | {"annotations/instances_val2017.json": '{"images": []}'}, "", "coco"),  # Ultralytics' COCO
        (YOLO | {"classes.txt": "cat", "annotations/instances_val2017.json": '{"images": []}'}, "", "yolo"),
        (YOLO | {"a.xml": "<annotation/>"}, "", "yolo"),
        (IN_A_FOLDER | {"1.json": LABELME}, "", "labelme"),  # labelme2yolo writes into labelme's folder
        (IN_A_FOLDER | {"1.json": '{"images": []}'}, "", "yolo"),
        ({"a.json.gz": b"PK"}, "a.json.gz", None),
        ({"a.json": VIA}, "", "via"),
        ({"a.json": VIA}, "a.json", "via"),
        ({"a.csv": "filename,file_size,file_attributes,region_count,"}, "", "via"),  # its reader says what to export
        ({"a.csv": "filename,width,height"}, "", None),
        ({"a.json": VIA, "b.json": LABELME}, "", "labelme"),
        ({"a.json": VIA, "a.xml": "<annotation/>"}, "", "voc"),
        ({"a.json": VIA, "coco.json": '{"images": []}'}, "", "coco"),  # made of VIA's file, as other tools ask for it
        (IN_A_FOLDER | {"a.json": VIA}, "", "yolo"),
        ({f"{i:02}.json": VIA for i in range(25)} | {"a.json": LABELME}, "", "labelme"),
        ({f"{i:02}.json": '{"a": 1}' for i in range(25)} | {"a.json": VIA}, "", "via"),
        ({"ann/a.jpg.json": SUPERVISELY}, "ann/a.jpg.json", "supervisely"),
        ({"meta.json": "{}", "ds/ann/a.jpg.json": SUPERVISELY}, "", "supervisely"),
        ({"ds/ann/a.jpg.json": SUPERVISELY, "z.json": LABELME}, "", "labelme"),
        (IN_A_FOLDER | {"ds/ann/a.jpg.json": SUPERVISELY}, "", "supervisely"),
        ({f"{i:02}.json": '{"a": 1}' for i in range(25)} | {"a.json": LABELME}, "", "labelme"),
        ({f"{i:02}.json": '{"a": 1}' for i in range(25)} | {"a.json": LABELME, "b.json": '{"images": []}'}, "", "coco"),
    ],
)
def test_formats_are_recognised(tmp_path, files, given, kind):
    assert recognise(write_files(tmp_path, files) / given) == kind


def test_sets_of_other_tools_and_things_that_are_not_there_cannot_be_split(tmp_path):
    write_files(tmp_path / "voc", {"a.xml": "<annotation/>"})
    (tmp_path / "empty").mkdir()
    (tmp_path / "set.zip").touch()
    for name, sentence in (
        ("voc", "it is a set of Pascal VOC; first run `tailseg data convert voc {path} OUT`"),
        ("voc/a.xml", "it is a set of Pascal VOC; first run `tailseg data convert voc {path} OUT`"),
        ("set.zip", "it is an archive; extract it"),
        ("empty", "there is no data set in it; give a folder with"),
        ("gone", "no such folder or file; check the path"),
    ):
        path = tmp_path / name
        assert attempt(read_set, path)[1].startswith(f"{path}: {sentence.format(path=path)}")


def test_the_command_names_every_format_that_is_read():
    assert tuple(READERS) == FORMATS
    assert NAMES.keys() == READERS.keys()
