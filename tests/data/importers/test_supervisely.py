import json
import unicodedata

import pytest
from foreign_files import attempt, converted, fault, picture, write_files
from hypothesis import given
from hypothesis import strategies as st
from supervisely_files import SIZE, bitmap, box, meta, polygon, row, supervisely, write
from tiny import tailseg

from tailseg.data.importers.convert import recognise
from tailseg.data.importers.in_place import import_in_place
from tailseg.data.importers.supervisely import is_supervisely, meta_above, read_supervisely
from tailseg.data.sources import open_data
from tailseg.errors import UserError


def files_of(found, root):
    return {split: [str(path.relative_to(root)) for path in part.files] for split, part in found.parts.items()}


# ---------------------------------------------------------------------------------------------------------
# Projects


def test_a_project_of_three_datasets(tmp_path):
    root = meta(tmp_path / "src", owl="polygon", cat="bitmap", dog="any")
    supervisely(root, "train/a.jpg", [polygon(title="owl"), bitmap(), box((5, 30), (9, 35), title="owl")])
    supervisely(root, "valid/a.jpg", [bitmap()])
    supervisely(root, "test/b.jpg", [bitmap()])
    splits, notes = converted("supervisely", root, tmp_path)
    assert [category.name for category in splits.train.categories] == ["cat", "owl"]
    assert splits.train.labels.tolist() == [1, 0, 1]
    assert splits.train.boxes.tolist() == [[10.5, 10.5, 30.5, 30.5], [15, 12, 35, 22], [5, 30, 10, 36]]
    assert list(splits.val.file_names) == ["valid/img/a.jpg"]
    assert notes[:2] == [
        f"1 annotation files in neither the training nor the validation split: left out ({root}/test/ann/b.jpg.json)",
        "1 classes without an object: left out (dog)",
    ]


def test_the_command_converts_a_project(tmp_path):
    root = meta(tmp_path / "src", cat="polygon")
    for number in range(6):
        supervisely(root, f"ds/{number}.jpg", [box()])
    done = tailseg("data", "convert", "supervisely", root, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "out/train.json").read_text())["annotations"][0]
    assert (row["bbox"], row["area"]) == ([10, 10, 20, 10], 200)
    done = tailseg("data", "convert", "supervisely", root / "meta.json", tmp_path / "again")
    assert done.returncode == 1
    sentence = "Supervisely writes one file for each image; give the folder of the whole project"
    assert f"{root}/meta.json: {sentence}" in " ".join(done.stderr.split())


def test_files_beside_the_annotations_are_no_matter(tmp_path):
    root = supervisely(meta(tmp_path, cat="polygon"), "ds/a.jpg", [polygon()])
    write_files(root, {f"ds/{name}/a.jpg.json": json.dumps({"size": 3}) for name in ("meta", "img_info")})
    write_files(root, {f"{name}.json": "{}" for name in ("key_id_map", "obj_class_to_machine_color")})
    for name in ("masks_human", "masks_machine"):
        picture(root / "ds" / name / "a.png")
    found = read_supervisely(root)
    assert files_of(found, root) == {"train": ["ds/img/a.jpg"]}
    assert found.notes == []


@pytest.mark.parametrize("folder", ["one", "one/datasets/two", "one/datasets/two/datasets/three"])
def test_datasets_may_lie_in_datasets(tmp_path, folder):
    supervisely(tmp_path, f"{folder}/a.jpg", [polygon()])
    supervisely(tmp_path, "other/a.jpg", [polygon()])
    assert files_of(read_supervisely(tmp_path), tmp_path) == {"train": [f"{folder}/img/a.jpg", "other/img/a.jpg"]}


@pytest.mark.parametrize(
    ("names", "train", "val", "left"),
    [
        (("ds0", "ds1"), ["ds0", "ds1"], None, 0),
        (("train", "val", "test"), ["train"], ["val"], 1),
        (("p/train2017", "p/datasets/val2017"), ["p/train2017"], ["p/datasets/val2017"], 0),
        (("training", "Validation", "ds"), ["training"], ["Validation"], 1),
        (("train", "test"), ["train"], None, 1),
    ],
)
def test_names_of_datasets_tell_splits(tmp_path, names, train, val, left):
    for name in names:
        supervisely(tmp_path, f"{name}/a.jpg", [polygon()])
    found = read_supervisely(tmp_path)
    expected = {"train": train} | ({"val": val} if val else {})
    assert files_of(found, tmp_path) == {
        split: [f"{name}/img/a.jpg" for name in own] for split, own in expected.items()
    }
    told = f"{left} annotation files in neither the training nor the validation split: left out"
    assert [note.startswith(told) for note in found.notes] == [True] * bool(left)


# ---------------------------------------------------------------------------------------------------------
# Classes


def test_old_files_leave_types_to_the_meta_that_is_nearest(tmp_path):
    """In one project `cat` is a line, in the other a polygon."""
    old = {key: value for key, value in polygon().items() if key != "geometryType"} | {"bitmap": None}
    supervisely(meta(tmp_path / "one", cat="line"), "ds/a.jpg", [old])
    supervisely(meta(tmp_path / "two", cat="polygon"), "ds/b.jpg", [old])
    supervisely(tmp_path, "three/c.jpg", [old])
    found = read_supervisely(tmp_path)
    assert [row["image_id"] for row in found.parts["train"].annotations] == [3]
    where = f"{tmp_path}/one/ds/ann/a.jpg.json: object 1"
    assert found.notes[0] == (f"1 points, lines, keypoints and cuboids, which are no areas: left out ({where})")
    assert found.notes[1].startswith("1 objects whose type neither they nor meta.json state: left out (")


@pytest.mark.parametrize("text", ["[", "[]", '{"classes": 3}', '{"classes": [3, {"title": 4}]}', "{}"])
def test_a_broken_meta_leaves_objects_that_state_their_type(tmp_path, text):
    root = supervisely(tmp_path, "ds/a.jpg", [polygon()])
    (root / "meta.json").write_text(text)
    notes = read_supervisely(root).notes
    told = f"1 files meta.json that cannot be read: left out ({root}/meta.json: "
    assert [note.startswith(told) for note in notes] == [True] * text.startswith("[")


def test_a_dataset_alone_has_its_classes_from_the_folder_above(tmp_path):
    """The other dataset of its project is not read, and no other file above."""
    old = {key: value for key, value in polygon().items() if key != "geometryType"}
    meta(tmp_path, cat="polygon", dog="polygon")
    supervisely(tmp_path, "ds/a.jpg", [old])
    supervisely(tmp_path, "other/b.jpg", [old])
    found = read_supervisely(tmp_path / "ds")
    assert files_of(found, tmp_path) == {"train": ["ds/img/a.jpg"]}
    assert found.notes == ["1 classes without an object: left out (dog)"]
    assert meta_above(tmp_path / "ds") == tmp_path / "meta.json"
    assert meta_above(tmp_path) is None
    meta(tmp_path / "ds", cat="line")
    with pytest.raises(UserError, match=r"no file in it has an object \(1 points, lines"):
        read_supervisely(tmp_path / "ds")


def test_an_import_of_a_dataset_alone_is_made_again_for_other_classes(tmp_path, monkeypatch):
    monkeypatch.setenv("TAILSEG_CACHE", str(tmp_path / "cache"))
    old = {key: value for key, value in box().items() if key != "geometryType"}
    for number in range(6):
        supervisely(meta(tmp_path, cat="rectangle"), f"ds/{number}.jpg", [old, bitmap(title="owl")])
    first = import_in_place("supervisely", tmp_path / "ds")
    assert import_in_place("supervisely", tmp_path / "ds") == first
    meta(tmp_path, cat="line")
    assert "5 training images with 5 objects" in import_in_place("supervisely", tmp_path / "ds").line


def test_names_in_two_unicode_forms_are_one_class(tmp_path):
    name = "caf\u00e9"
    root = meta(tmp_path, **{unicodedata.normalize("NFD", name): "polygon"})
    supervisely(root, "ds/a.jpg", [polygon(title=unicodedata.normalize(form, name)) for form in ("NFC", "NFD")])
    found = read_supervisely(root)
    assert [row["name"] for row in found.categories] == [name]
    assert found.notes == []


# ---------------------------------------------------------------------------------------------------------
# Images


@pytest.mark.parametrize(
    ("annotation", "image"),
    [
        ("a.jpg.json", "a.jpg"),
        ("a.json", "a.jpg"),  # of old exports
        ("a.b.json", "a.b.png"),
        ("a.jpg.json", "a.JPG"),
        ("a b \u00fc.png.json", "a b \u00fc.png"),
    ],
)
def test_the_image_in_the_folder_beside(tmp_path, annotation, image):
    write(tmp_path / "ds" / "ann" / annotation, [polygon()])
    picture(tmp_path / "ds" / "img" / image)
    picture(tmp_path / "images" / image)
    assert read_supervisely(tmp_path).parts["train"].files == [tmp_path / "ds" / "img" / image]


def test_images_of_a_download_without_them(tmp_path):
    """Where datasets have no folder img, images may lie anywhere in the source, the nearest by the names of folders."""
    for split in ("train", "val"):
        write(tmp_path / "project" / split / "ann" / "1.jpg.json", [polygon()])
        picture(tmp_path / "images" / split / "1.jpg")
    assert files_of(read_supervisely(tmp_path), tmp_path) == {
        "train": ["images/train/1.jpg"],
        "val": ["images/val/1.jpg"],
    }


def test_the_image_of_another_dataset_is_not_meant(tmp_path):
    for name in ("train/a.jpg", "train/b.jpg", "val/c.jpg"):
        supervisely(tmp_path, name, [polygon()])
    path = write(tmp_path / "val/ann/a.jpg.json", [polygon()])
    found = read_supervisely(tmp_path)
    assert files_of(found, tmp_path) == {"train": ["train/img/a.jpg", "train/img/b.jpg"], "val": ["val/img/c.jpg"]}
    assert found.notes == [
        f"1 annotation files without image: left out ({path}: its image 'a.jpg' is not in {tmp_path}/val/img)"
    ]


def test_images_and_files_without_each_other_are_counted(tmp_path):
    root = tmp_path / "ds"
    for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg"):
        supervisely(tmp_path, f"ds/{name}", [polygon()])
    supervisely(tmp_path, "ds/empty.jpg", [])
    write(root / "ann" / "lost.jpg.json", [polygon()])
    write(root / "ann" / "a.json", [polygon()])
    supervisely(tmp_path, "ds/other.jpg", [polygon()], size={"height": 40, "width": 81})
    (root / "img" / "broken.jpg").write_text("hello")
    write(root / "ann" / "broken.jpg.json", [polygon()])
    picture(root / "img" / "unlabelled.png")
    write_files(root / "ann", {"cut.jpg.json": f'{{"size": {json.dumps(SIZE)}, "objects": [', "coco.json": "{}"})
    found = read_supervisely(tmp_path)
    assert [path.name for path in found.parts["train"].files] == ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "empty.jpg"]
    ann = root / "ann"
    assert found.notes == [
        f"1 JSON files that are not Supervisely's: left out ({ann}/coco.json)",
        f"1 annotation files for an image that is used already: left out ({ann}/a.json)",
        "1 annotation files whose image cannot be read: left out "
        f"({ann}/broken.jpg.json: {root}/img/broken.jpg: not an image that can be read)",
        "1 JSON files that cannot be read: left out "
        f"({ann}/cut.jpg.json: not valid JSON: unexpected end of data at line 1, column 51)",
        f"1 annotation files without image: left out ({ann}/lost.jpg.json: its image 'lost.jpg' is not in {root}/img)",
        "1 annotation files that state another size than their image has: left out "
        f"({ann}/other.jpg.json: it says 81 x 40 pixels but {root}/img/other.jpg has 80 x 40)",
        f"1 images without an object: kept, as images that show none of the classes ({root}/img/empty.jpg)",
        f"1 images without annotation: left out ({root}/img/unlabelled.png)",
    ]


def test_an_export_without_images(tmp_path):
    for name in "abc":
        write(tmp_path / "src" / "ds" / "ann" / f"{name}.jpg.json", [polygon()])
    assert fault("supervisely", tmp_path / "src", tmp_path) == (
        f"{tmp_path}/src/ds/ann/a.jpg.json: its image 'a.jpg' is not in {tmp_path}/src; put it into "
        f"{tmp_path}/src/ds/img, or give the folder that holds both (3 of 3 annotation files are at fault)"
    )
    supervisely(tmp_path / "src", "ds/a.jpg", [polygon()])
    message = fault("supervisely", tmp_path / "src" / "ds" / "ann", tmp_path)
    assert message.startswith(f"{tmp_path}/src/ds/ann/a.jpg.json: its image 'a.jpg' is not in {tmp_path}/src/ds/ann; ")


@pytest.mark.parametrize("size", [None, {}, {"height": 0, "width": 0}, {"height": "x", "width": 80}])
def test_a_size_may_be_unknown_beside_a_file_that_is_recognised(tmp_path, size):
    path = write(tmp_path / "ds/ann/a.jpg.json", [polygon()], size=size, more={"size": SIZE})
    picture(tmp_path / "ds/img/a.jpg")
    assert is_supervisely(path)
    assert read_supervisely(tmp_path).parts["train"].images[0]["height"] == 40


def test_an_image_that_the_camera_turned(tmp_path):
    picture(tmp_path / "ds/img/a.jpg", (80, 40), 6)
    write(tmp_path / "ds/ann/a.jpg.json", [polygon()], size={"height": 80, "width": 40})
    picture(tmp_path / "ds/img/b.jpg", (80, 40), 6)
    write(tmp_path / "ds/ann/b.jpg.json", [polygon()])
    rows = read_supervisely(tmp_path).parts["train"].images
    assert [(row["height"], row["width"]) for row in rows] == [(80, 40), (40, 80)]


def test_nothing_outside_of_the_source_is_read(tmp_path):
    root = tmp_path / "src"
    picture(tmp_path / "private.jpg")
    (root / "ds/img").mkdir(parents=True)
    for name in ("\\..\\private.jpg.json", "private.jpg.json", "C:\\private.jpg.json"):
        write(root / "ds/ann" / name, [polygon()])
    assert fault("supervisely", root, tmp_path).endswith("(3 of 3 annotation files are at fault)")
    (root / "ds/img/private.jpg").symlink_to(tmp_path / "private.jpg")
    assert "is a link that leads out of" in fault("supervisely", root, tmp_path)


# ---------------------------------------------------------------------------------------------------------
# What is no such project


@pytest.mark.parametrize(("kind", "name"), [("video", "videos"), ("pointcloud", "point clouds"), ("volume", "volumes")])
def test_projects_of_other_things_than_images(tmp_path, kind, name):
    path = write(tmp_path / "ds/ann/a.mp4.json", [], frames=[], framesCount=3)
    (tmp_path / "ds" / kind).mkdir()
    message = (
        f"{tmp_path}/ds: it is a Supervisely dataset of {name}; turn it into a project of images in Supervisely "
        "and export that"
    )
    assert attempt(read_supervisely, tmp_path)[1] == message
    assert attempt(open_data, str(tmp_path))[1] == message
    path.rename(tmp_path / "ds" / "annotation.json")  # of an episode of point clouds
    assert attempt(read_supervisely, tmp_path)[1] == message
    supervisely(tmp_path, "ds/a.jpg", [polygon()])
    assert read_supervisely(tmp_path).parts["train"].annotations


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({}, "there is no JSON file in it; give the folder of a Supervisely project, which holds meta.json"),
        ({"meta.json": "{}"}, "none of its 1 JSON files has annotations; give the folder"),
        ({"ds/ann/a.json": "[" * 100_000}, "none of its 1 JSON files has annotations"),
    ],
)
def test_folders_without_annotations(tmp_path, files, problem):
    with pytest.raises(UserError, match=f"^{tmp_path}: {problem}"):
        read_supervisely(write_files(tmp_path, files))


@pytest.mark.parametrize(
    ("objects", "problem"),
    [
        ("[" * 5000 + "]" * 5000, "not valid JSON: .* at line 1, column [0-9]+; write it again"),
        ('["\\ud800"]', "not valid JSON"),
        ("[NaN]", "not valid JSON"),
        ("[], ", "not valid JSON"),
        ('[], "objects": 3', "it has no list 'objects'; check the file"),
    ],
)
def test_files_at_fault_are_named(tmp_path, objects, problem):
    picture(tmp_path / "ds/img/a.jpg")
    write_files(tmp_path, {"ds/ann/a.jpg.json": f'{{"size": {json.dumps(SIZE)}, "objects": {objects}}}'})
    with pytest.raises(UserError, match=f"^{tmp_path}/ds/ann/a.jpg.json: {problem}"):
        read_supervisely(tmp_path)


def test_a_file_of_gigabytes(tmp_path, monkeypatch):
    monkeypatch.setattr("tailseg.data.importers.supervisely.MAX_BYTES", 1 << 20)
    root = supervisely(tmp_path, "ds/a.jpg", [polygon()] * 10_000)
    with pytest.raises(UserError, match=r"ds/ann/a.jpg.json: it has more than 1 MB; export it again"):
        read_supervisely(root)


@pytest.mark.parametrize(
    ("objects", "problem"),
    [([], "no file in it has an object; check the folder"), ([row("line")], "no file in it has an object (1 points")],
)
def test_a_project_without_objects(tmp_path, objects, problem):
    assert problem in fault("supervisely", supervisely(tmp_path / "src", "ds/a.jpg", objects), tmp_path)


@given(st.binary(max_size=60) | st.text(alphabet='{}[]":,0 objectsize', max_size=40).map(str.encode))
def test_any_file_is_read_or_refused(tmp_path_factory, content):
    root = tmp_path_factory.mktemp("any")
    for text in (content, b'{"size": {"height": 4, "width": 8}, "objects": [' + content + b"]}"):
        write_files(root, {"ds/ann/a.jpg.json": text, "meta.json": content})
        _, refused = attempt(read_supervisely, root)
        assert str(root) in refused


# ---------------------------------------------------------------------------------------------------------
# Recognition

ANNOTATION = '{"description": "", "tags": [], "size": {"height": 4, "width": 8}, "objects": []}'


@pytest.mark.parametrize(
    ("text", "own"),
    [
        (ANNOTATION, True),
        ("\ufeff\n" + ANNOTATION, True),
        ('{"objects": [' + "1," * 5000 + '1], "size": {"width": 8,\n"height": 4}}', True),
        (ANNOTATION.replace('"tags"', '"images": [], "tags"'), False),  # COCO's
        (ANNOTATION.replace('"tags"', '"shapes": [], "tags"'), False),  # labelme's
        (ANNOTATION.replace('"tags"', '"imagePath": "a.jpg", "tags"'), False),
        (ANNOTATION.replace('"width": 8', '"width": 8, "depth": 3'), False),  # Pascal VOC as JSON
        (ANNOTATION.replace("objects", "regions"), False),  # VoTT's
        (f"[{ANNOTATION}]", False),
        ('{"imgHeight": 4, "imgWidth": 8, "objects": []}', False),  # Cityscapes'
        ("", False),
        ("{}", False),
    ],
)
def test_files_of_supervisely_are_told_by_their_ends(tmp_path, text, own):
    (tmp_path / "a.json").write_text(text)
    assert is_supervisely(tmp_path / "a.json") is own
    assert not is_supervisely(tmp_path)
    assert not is_supervisely(tmp_path / "gone.json")


def test_data_takes_a_project_a_dataset_and_nothing_less(tmp_path, monkeypatch):
    monkeypatch.setenv("TAILSEG_CACHE", str(tmp_path / "cache"))
    root = meta(tmp_path / "src", cat="polygon")
    for number in range(6):
        supervisely(root, f"ds/{number}.jpg", [bitmap()])
        write_files(root, {f"a{number}/meta/{number}.jpg.json": "{}" for number in range(30)})  # many before the first
    for source in (root, root / "ds"):
        assert recognise(source) == "supervisely"
        splits = open_data(str(source), show=False)
        assert (len(splits.train), len(splits.val)) == (5, 1)
        assert splits.train.boxes.tolist() == [[15, 12, 35, 22]] * 5
    message = attempt(open_data, str(root / "ds/ann/0.jpg.json"))[1]
    assert message.endswith("Supervisely writes one file for each image; give the folder of the whole project")
