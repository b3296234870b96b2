"""Sets of other tools that stay where they are: their annotations in the cache."""

import base64
import io
import json
import os
import time
from functools import partial

import pytest
from foreign_files import coco_set, picture
from PIL import Image

from tailseg.data.importers import in_place
from tailseg.data.importers.convert import convert
from tailseg.data.importers.in_place import import_in_place
from tailseg.data.sources import open_data
from tailseg.errors import UserError


@pytest.fixture
def imports(tmp_path, monkeypatch):
    monkeypatch.setenv("TAILSEG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "imports"


def folders(imports):
    return sorted(path.name for path in imports.iterdir())


def test_images_stay_and_annotations_are_read_once(tmp_path, imports, monkeypatch):
    source = coco_set(tmp_path / "src", "instances_default.json", "images/default", range(6))
    found = import_in_place("coco", source)
    assert found.images == source / "images" / "default"
    assert found.line == "5 training images with 5 objects, 1 validation images with 1"
    assert found.notes == [
        "the source has no validation split: a fifth of the images was set aside, rare classes first"
    ]
    assert {path.name for path in found.train.parent.iterdir()} == {"train.json", "val.json", "import.json"}
    monkeypatch.setattr(in_place, "read_source", None)
    assert import_in_place("coco", source) == found


@pytest.mark.parametrize(
    "change",
    [
        lambda source: (source / "a.json").write_text((source / "a.json").read_text().replace('"cat"', '"owl"')),
        lambda source: picture(source / "images" / "7.jpg"),
        lambda source: picture(source / "images" / "1.jpg", (80, 40), 3),
        lambda source: os.utime(source / "images" / "1.jpg", (1, 1)),
    ],
)
def test_a_changed_source_is_imported_again(tmp_path, imports, change):
    source = coco_set(tmp_path / "src", "a.json", "images", range(6))
    import_in_place("coco", source)
    os.utime(source / "a.json", (1, 1))  # its bytes count, not its times
    import_in_place("coco", source)
    assert len(folders(imports)) == 1
    change(source)
    import_in_place("coco", source)
    assert len(folders(imports)) == 2


@pytest.mark.parametrize("name", ["train.json", "val.json", "import.json"])
@pytest.mark.parametrize("place", [0, 40, -3])
def test_a_damaged_import_is_made_again(tmp_path, imports, name, place):
    source = coco_set(tmp_path / "src", "a.json", "images", range(6))
    found = import_in_place("coco", source)
    path = found.train.parent / name
    sound = path.read_bytes()
    changed = bytearray(sound)
    changed[place] ^= 1
    path.write_bytes(changed)
    assert import_in_place("coco", source) == found
    assert path.read_bytes() == sound
    path.unlink()
    assert import_in_place("coco", source) == found


def test_a_yolo_set_elsewhere_is_looked_at_where_it_lies(tmp_path, imports):
    data = tmp_path / "disk"
    for number in range(6):
        picture(data / "images" / f"{number}.jpg")
        (data / "labels").mkdir(exist_ok=True)
        (data / "labels" / f"{number}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "pets.yaml").write_text(f"path: {data}\ntrain: images\nnames: [cat]\n")
    assert import_in_place("yolo", tmp_path / "home" / "pets.yaml").images == data / "images"
    (data / "labels" / "3.txt").write_text("0 0.5 0.5 0.25 0.25\n")
    import_in_place("yolo", tmp_path / "home" / "pets.yaml")
    assert len(folders(imports)) == 2


def test_images_of_several_disks(tmp_path, imports):
    source = coco_set(coco_set(tmp_path / "src", "train.json", "train", (1, 2)), "val.json", "val", (3,))
    for split in ("train", "val"):
        (source / split).rename(tmp_path / f"{split}-disk")
        (source / split).symlink_to(tmp_path / f"{split}-disk")
    splits = open_data(str(source), show=False)
    assert splits.train.image_path(0) == tmp_path / "train-disk" / "1.jpg"
    assert splits.val.image_path(0) == tmp_path / "val-disk" / "3.jpg"


def test_images_that_stand_in_annotation_files_go_into_the_cache(tmp_path, imports):
    content = io.BytesIO()
    Image.new("RGB", (80, 40), "red").save(content, "PNG")
    for number in range(6):
        shape = {"label": "cat", "points": [[1, 1], [20, 1], [9, 9]], "shape_type": "polygon"}
        row = {"version": "5.0.1", "flags": {}, "shapes": [shape], "imagePath": f"{number}.png"}
        row |= {"imageData": base64.b64encode(content.getvalue()).decode(), "imageHeight": 40, "imageWidth": 80}
        (tmp_path / "src").mkdir(exist_ok=True)
        (tmp_path / "src" / f"{number}.json").write_text(json.dumps(row))
    found = import_in_place("labelme", tmp_path / "src")
    assert found.images == found.train.parent / "images"
    assert len(list(found.images.iterdir())) == 6
    splits = open_data(str(tmp_path / "src"), show=False)
    assert len(splits.train) == 5


def test_an_import_that_nobody_uses_goes(tmp_path, imports):
    first = import_in_place("coco", coco_set(tmp_path / "one", "a.json", "images", range(6)))
    second = import_in_place("coco", coco_set(tmp_path / "two", "a.json", "images", range(6)))
    old = time.time() - 31 * 24 * 3600
    for found in (first, second):
        os.utime(found.train.parent, (old, old))
    import_in_place("coco", tmp_path / "two")  # is in use
    import_in_place("coco", coco_set(tmp_path / "three", "a.json", "images", range(6)))
    assert not first.train.exists()
    assert second.train.exists()


@pytest.mark.usefixtures("imports")
def test_names_in_another_encoding_than_utf_8(tmp_path):
    """As they come out of archives of Windows: JSON cannot hold them."""
    root = coco_set(tmp_path / "src", "a.json", "images", range(4))
    other = os.fsdecode(b"stra\xdfe.jpg")
    picture(tmp_path / "x.jpg").rename(root / "images" / other)
    found = import_in_place("coco", root)
    assert found.notes[0] == r"1 images that these annotations do not list: left out (images/stra\udcdfe.jpg)"
    (root / "images" / other).unlink()
    (root / "images").rename(root / os.fsdecode(b"im\xe4ges"))
    for job in (partial(import_in_place, "coco", root), partial(convert, "coco", root, tmp_path / "out")):
        with pytest.raises(UserError, match=r"src/im\\xe4ges/0\.jpg: the name is no UTF-8 text; rename"):
            job()
    assert not (tmp_path / "out").exists()
