import json

import pytest
from foreign_files import converted, picture
from PIL import Image

from tailseg.data.annotations.oddities import Tally
from tailseg.data.importers.coco import read_coco
from tailseg.data.importers.coco_images import usable_images
from tailseg.errors import UserError


def usable(root, rows, exchanged=True):
    """The usable images' names and sizes, and what was counted."""
    met, done, asked = Tally(), [], []

    def ask(images):
        asked.append(images)
        return exchanged

    images, _ = usable_images(rows, root / "train.json", root, "train", met, done.append, ask, alone=True)
    assert asked in ([], [{1: (40, 80)}])
    assert done == list(range(1, len(rows) + 1))
    return [(image.path.name, image.image_hw) for image in images], met


def entries(*names, **changes):
    return [{"id": i, "file_name": name, "height": 40, "width": 80} | changes for i, name in enumerate(names)]


def test_images_that_cannot_be_used_are_counted_by_kind(tmp_path, monkeypatch):
    for name in ("a", "b", "c", "d", "e", "f"):
        picture(tmp_path / f"{name}.jpg")
    picture(tmp_path / "other.jpg", size=(80, 41))
    Image.new("L", (100, 100)).save(tmp_path / "large.png")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8")
    (tmp_path / "cut.jpg").write_bytes(picture(tmp_path / "cut.jpg").read_bytes()[:-200])
    Image.new("F", (80, 40)).save(tmp_path / "floats.tif")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4_000)
    faulty = ("gone.jpg", "other.jpg", "large.png", "broken.jpg", "cut.jpg", "floats.tif")
    rows = entries("a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg", "f.jpg", *faulty, "a.jpg", "a.jpg")
    rows[5]["id"] = None
    images, met = usable(tmp_path, rows)
    assert images == [(f"{name}.jpg", (40, 80)) for name in "abcdeaa"]
    places = {kind: told[0] for kind, told in met.places.items()}
    assert places["missing_image"] == "gone.jpg"
    assert places["image_without_id"] == "f.jpg"
    assert places["other_size"] == "other.jpg: it says 80 x 40 pixels and has 80 x 41"
    assert "too large (10,000 pixels" in places["large_image"]
    assert [place.split(":")[0] for place in met.places["broken_image"]] == ["broken.jpg", "cut.jpg", "floats.tif"]
    assert met.counts == dict.fromkeys(places, 1) | {"broken_image": 3}


def test_sizes_are_those_of_the_files_where_they_can_be_meant(tmp_path):
    """Stated as shown or as stored; exchanged, as texts, or not stated at all."""
    for name in ("a", "b", "c", "d"):
        picture(tmp_path / f"{name}.jpg")
    picture(tmp_path / "turned.jpg", orientation=6)
    rows = entries("a.jpg", "b.jpg", "c.jpg", "d.jpg", "turned.jpg", "turned.jpg")
    rows[1] |= {"height": 80, "width": 40}
    rows[2] |= {"height": "40", "width": 80.0}
    rows[3] |= {"height": None}
    rows[5] |= {"height": 80, "width": 40}
    images, met = usable(tmp_path, rows)
    assert [hw for _, hw in images] == [(40, 80)] * 5 + [(80, 40)]
    assert met.places == {"size_exchanged": ["image 1"], "size_read": ["image 3"]}
    images, met = usable(tmp_path, rows, exchanged=False)
    assert [hw for _, hw in images] == [(40, 80)] * 4 + [(80, 40)]
    assert met.places["other_size"] == ["b.jpg: it says 40 x 80 pixels and has 80 x 40"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"file_name": "x.jpg"},
            "3 of its 3 images are not in {}, the first of them x.jpg; put the images there, "
            "or name their folder in a YAML file with train, val and images",
        ),
        (
            {"file_name": None},
            "3 of its 3 images have no file_name, the first of them image 0; give each the name of its file",
        ),
        ({"id": [1]}, "3 of its 3 images have no id, the first of them a.jpg; number them"),
        (
            {"height": 20},
            "3 of its 3 images have another size than stated, the first of them a.jpg: it says 80 x 20 pixels and has "
            "80 x 40; correct height and width, or put the images there that were annotated",
        ),
    ],
)
def test_a_fault_of_most_images_is_an_error(tmp_path, changes, problem):
    picture(tmp_path / "a.jpg")
    with pytest.raises(UserError) as caught:
        usable(tmp_path, entries("a.jpg", "a.jpg", "a.jpg", **changes))
    assert str(caught.value) == f"{tmp_path / 'train.json'}: {problem.format(tmp_path)}"


def test_images_of_one_name_in_several_folders_are_told_by_their_sizes_or_left_out(tmp_path):
    """Their objects were merged onto the pictures of the first folder."""
    for name in ("cam1/a", "cam2/b"):
        picture(tmp_path / f"{name}.jpg")
    for name in ("cam1/b", "cam2/a"):
        picture(tmp_path / f"{name}.jpg", size=(40, 40))
    rows = entries("a.jpg", "b.jpg", "a.jpg", "b.jpg")
    for row in rows[2:]:
        row["width"] = 40
    met = Tally()
    images, files = usable_images(
        rows, tmp_path / "train.json", tmp_path, "train", met, lambda done: None, dict, alone=True
    )
    places = [(image.row["id"], str(image.path.relative_to(tmp_path))) for image in images]
    assert places == [(0, "cam1/a.jpg"), (1, "cam2/b.jpg"), (2, "cam2/a.jpg"), (3, "cam1/b.jpg")]
    assert (len(files), met.counts) == (4, {})

    rows[2]["width"] = 80  # entries 0 and 2 are of the same name and size
    images, files = usable_images(
        rows, tmp_path / "train.json", tmp_path, "train", met, lambda done: None, dict, alone=True
    )
    assert [image.row["id"] for image in images] == [1, 3]
    assert met.places == {"one_of_several": ["a.jpg: any of 2 files", "a.jpg: any of 2 files"]}
    assert len(files) == 4  # none is one that the annotations do not list
    for row in rows:
        row["width"] = 80
    with pytest.raises(UserError) as caught:
        usable(tmp_path, rows)
    assert str(caught.value) == (
        f"{tmp_path}/train.json: 4 of its 4 images may be any of several files in {tmp_path}, the first of them "
        "a.jpg: any of 2 files; write their folders into the names"
    )


def test_no_images(tmp_path):
    images, met = usable(tmp_path, [])
    assert (images, met.counts) == ([], {})


def test_what_is_written_can_be_trained_on(tmp_path):
    """`data check` told of another size than stated, and the repaired copy still had it."""
    for i in range(6):
        picture(tmp_path / "src" / f"{i}.jpg")
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 80, "width": 40} for i in range(6)]
    images[0] |= {"height": 400, "width": 800}
    flat = [20, 10, 60, 10, 20, 30]
    rows = [{"id": i, "image_id": i, "category_id": 1, "segmentation": [flat]} for i in range(6)]
    rows[1]["bbox"] = [20, 10, 40, 20]  # too wide for an image of 40 x 80
    content = {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "src" / "a.json").write_text(json.dumps(content))
    splits, notes = converted("coco", tmp_path / "src", tmp_path)
    assert (len(splits.train), len(splits.val)) == (4, 1)
    assert splits.train.image_sizes.tolist() == [[40, 80]] * 4
    assert any(note.startswith("1 images of another size than stated: left out") for note in notes)
    assert any(note.startswith("5 images whose height and width are exchanged") for note in notes)


@pytest.mark.parametrize(
    "rows",
    [
        [{"bbox": [1, 1, 39, 39]}],  # fits both
        [{"bbox": [1, 1, 79, 39]}, {"bbox": [1, 1, 39, 79]}],  # neither fits both
        [{"segmentation": {"size": [80, 40]}}, {"bbox": [1, 1, 79, 39]}],
        [{"segmentation": {"size": "40"}}, {"bbox": [1, 1, 39]}, {}],
    ],
)
def test_sizes_are_not_exchanged_unless_the_objects_show_it(tmp_path, rows):
    picture(tmp_path / "a.jpg")

    def write(annotations):
        image = {"id": 1, "file_name": "a.jpg", "height": 80, "width": 40}
        of_image = [{"image_id": 1, "category_id": 1, **row} for row in annotations]
        content = {"categories": [{"id": 1, "name": "cat"}], "images": [image], "annotations": of_image}
        (tmp_path / "a.json").write_text(json.dumps(content))

    write(rows)
    with pytest.raises(UserError, match="1 of its 1 images have another size than stated"):
        read_coco(tmp_path)
    write([{"segmentation": {"size": [40, 80], "counts": [99, 3101]}}])
    assert read_coco(tmp_path).parts["train"].images[0]["height"] == 40
