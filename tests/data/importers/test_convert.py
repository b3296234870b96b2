import json
import os

import pytest
from foreign_files import coco_set, converted

from tailseg.data.importers.convert import convert, image_note, only_train_note
from tailseg.errors import UserError


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


def test_every_image_is_reported(tmp_path):
    done = []
    convert("coco", coco_set(tmp_path / "src", "a.json", "images", range(5)), tmp_path / "out", progress=done.append)
    assert done == [1, 2, 3, 4, 5] * 2  # read, then written
