import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from foreign_files import converted, fault, picture, write_files
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tailseg.data.images import IMAGE_SUFFIXES, read_image
from tailseg.data.importers.yolo import is_yolo, read_yolo
from tailseg.data.sources import open_data
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


@pytest.mark.parametrize("suffix", [".tif", ".jpg", ".png", ".webp"])
def test_a_turned_picture_is_turned_once(tmp_path, suffix):
    """Pillow has turned a TIFF when it tells its size; the pixels of the others are turned by us."""
    root = yolo(tmp_path / "src", {"train/1": "0 0.3 0.5 0.4 0.8", "val/1": "0 0.3 0.5 0.4 0.8"})
    for split in ("train", "val"):
        (root / f"images/{split}/1.jpg").unlink()
        picture(root / f"images/{split}/1{suffix}", (200, 100), orientation=6)
    splits, _ = converted("yolo", root, tmp_path)  # opens the set, which compares sizes and files
    assert splits.train.image_sizes.tolist() == [[200, 100]]
    assert splits.train.boxes_xywh.tolist() == [[10, 20, 40, 160]]
    assert read_image(splits.train.image_path(0)).shape == (200, 100, 3)


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


def objects_of(source, notes=None):
    """The classes of the objects in each image of each split, by the images' new names."""
    found = read_yolo(source)
    names = {row["id"]: row["name"] for row in found.categories}
    if notes is not None:
        notes += found.notes
    return {
        split: {
            image["file_name"]: [names[r["category_id"]] for r in part.annotations if r["image_id"] == image["id"]]
            for image in part.images
        }
        for split, part in found.parts.items()
    }


# ---------------------------------------------------------------------------------------------------------
# Layouts of tools


@pytest.mark.parametrize("key", ["val", "valid", "validation", "Valid", "VAL"])
def test_every_spelling_of_the_validation_split(tmp_path, key):
    labels = {f"train/{i}": f"0 {TRIANGLE}" for i in range(5)} | {f"valid/{i}": f"1 {TRIANGLE}" for i in range(3)}
    root = yolo(tmp_path / "src", labels, path=".", **({"val": None} | {key: "images/valid"}))
    splits, notes = converted("yolo", root, tmp_path)
    assert (len(splits.train), len(splits.val)) == (5, 3)
    assert splits.val.labels.tolist() == [1, 1, 1]
    assert notes == ["images are hard links to the source's files"]


def test_every_image_that_prediction_reads_is_imported(tmp_path):
    root = yolo(tmp_path / "src", {"train/e0": f"0 {TRIANGLE}", "val/1": f"0 {TRIANGLE}"})
    suffixes = [suffix for suffix in IMAGE_SUFFIXES if suffix in (".jpeg", ".png", ".webp", ".bmp", ".tif", ".gif")]
    for number, suffix in enumerate(suffixes, start=1):
        picture(root / "images" / "train" / f"e{number}{suffix.upper()}")
        write_files(root, {f"labels/train/e{number}.txt": f"1 {TRIANGLE}"})
    splits, _ = converted("yolo", root, tmp_path)
    assert splits.train.labels.tolist() == [0] + [1] * len(suffixes)
    assert len(suffixes) >= 5


def test_label_studio(tmp_path):
    files = {f"images/{i}.jpg": None for i in range(2)} | {f"labels/{i}.txt": f"1 {TRIANGLE}" for i in range(2)}
    notes_json = '{"categories": [{"id": 0, "name": "cat"}, {"id": 1, "name": "owl"}], "info": {"year": 2024}}'
    write_files(tmp_path, files | {"classes.txt": "cat\nowl\n", "notes.json": notes_json})
    notes = []
    assert objects_of(tmp_path, notes) == {"train": {"0.jpg": ["owl"], "1.jpg": ["owl"]}}
    assert notes == []


def test_labelimg_writes_beside_the_images(tmp_path):
    write_files(tmp_path, {"a.jpg": None, "a.txt": "0 0.5 0.5 0.5 0.5", "b.jpg": None, "classes.txt": "cat\nowl\n"})
    notes = []
    assert objects_of(tmp_path, notes) == {"train": {"a.jpg": ["cat"], "b.jpg": []}}
    assert notes == [
        f"1 images without a label file: taken as images without objects ({tmp_path}/b.jpg)",
        "1 objects have a box only: their masks are rectangles",
    ]


def test_without_names_the_numbers_are_the_names(tmp_path):
    files = {"train/images/a.jpg": None, "train/labels/a.txt": f"7 {TRIANGLE}\n2 {TRIANGLE}"}
    write_files(tmp_path, files | {"valid/images/b.jpg": None, "valid/labels/b.txt": f"11 {TRIANGLE}"})
    notes = []
    assert objects_of(tmp_path, notes) == {
        "train": {"train/a.jpg": ["class_7", "class_2"]},
        "val": {"valid/b.jpg": ["class_11"]},
    }
    assert [row["name"] for row in read_yolo(tmp_path).categories] == ["class_2", "class_7", "class_11"]
    assert notes == ["no file tells the class names: they are class_0 and so on; write one a line to classes.txt"]


def test_classes_keep_their_numbers(tmp_path):
    root = yolo(tmp_path, {"train/1": f"9 {TRIANGLE}\n1 {TRIANGLE}", "val/1": ""}, names={1: 2024, 9: "no"})
    assert objects_of(root)["train"] == {"train/1.jpg": ["no", "2024"]}


def test_keypoints_are_left_out_and_said_so(tmp_path):
    line = "0 0.5 0.5 0.5 0.5 0.4 0.4 0.6 0.6"  # would be a polygon of four points
    root = yolo(tmp_path, {"train/1": line, "val/1": ""}, kpt_shape=[2, 2])
    found = read_yolo(root)
    assert found.parts["train"].annotations[0]["bbox"] == [20, 10, 40, 20]
    assert "the set has keypoints (kpt_shape): they were left out" in found.notes


def test_a_set_on_another_disk(tmp_path):
    disk = yolo(tmp_path / "disk", {"train/1": f"0 {TRIANGLE}", "val/1": f"1 {TRIANGLE}"})
    (tmp_path / "src").mkdir()
    root = yolo(tmp_path / "src", {}, train=str(disk / "images/train"), val="../disk/images/val")
    splits, _ = converted("yolo", root, tmp_path)
    assert list(splits.train.file_names) + list(splits.val.file_names) == ["train/1.jpg", "val/1.jpg"]
    assert splits.train.labels.tolist() + splits.val.labels.tolist() == [0, 1]


def test_train_and_val_the_same_are_divided(tmp_path):
    root = yolo(tmp_path / "src", {f"train/{i}": f"0 {TRIANGLE}" for i in range(10)}, val="images/train")
    splits, notes = converted("yolo", root, tmp_path)
    assert (len(splits.train), len(splits.val)) == (8, 2)
    assert f"{root}/data.yaml: train and val are the same images; they are taken as one set" in notes


# ---------------------------------------------------------------------------------------------------------
# What is odd is counted


def test_odd_things_are_left_out_and_counted(tmp_path):
    root = yolo(
        tmp_path,
        {
            "train/1": f"0 {TRIANGLE}\n0 0.1 0.2 0.3\n0 0.5 0.5 0.1 0.1 0.9\n1 {TRIANGLE}",
            "train/2": f"1 {TRIANGLE}",
            "train/3": f"1 {TRIANGLE}",
            "train/4": f"0 0.1 0.1 0.2 0.2 0.3 0.3\n0 0.5 0 0.5 1 0.5 0.5\n1 {TRIANGLE}",
            "val/1": f"0 {TRIANGLE}",
        },
        test="images/test",
    )
    write_files(
        root, {"images/train/2.jpg": b"no image", "labels/train/3.txt": b"\xff\xfe0", "images/test/1.jpg": None}
    )
    write_files(root, {"labels/train/5.txt": f"0 {TRIANGLE}", "images/train/5.heic": b"x", "labels/train.cache": b"x"})
    notes = []
    train = objects_of(root, notes)["train"]
    assert train == {"train/1.jpg": ["cat", "owl"], "train/4.jpg": ["owl"]}
    labels, images = root / "labels/train", root / "images/train"
    assert notes == [
        f"{root}/data.yaml: its path ../datasets/x is not here; the file's own folder was taken",
        f"1 images of the test split: left out ({root}/images/test/1.jpg)",
        f"1 lines that are neither a polygon of 3 points or more nor a box: left out ({labels}/1.txt: line 2)",
        f"1 lines with a confidence: left out ({labels}/1.txt: line 3)",
        f"1 images that cannot be read: left out with their labels ({images}/2.jpg)",
        f"1 images whose label file is not a UTF-8 text: left out ({labels}/3.txt)",
        f"1 label files without an image: left out ({labels}/5.txt)",
        f"2 objects without extent in their image: left out ({images}/4.jpg, {images}/4.jpg)",
    ]


@pytest.mark.parametrize(("beyond", "hint"), [(1, True), (0, False)])
def test_boxes_that_are_written_as_corners_are_told_from_a_tenth_on(tmp_path, beyond, hint):
    lines = ["0 0.5 0.5 0.2 0.2"] * 9 + ["0 0.6 0.6 0.95 0.9" if beyond else "0 0.6 0.6 0.5 0.5"]
    root = yolo(tmp_path / "src", {"train/1": "\n".join(lines), "val/1": ""})
    notes = read_yolo(root).notes
    warning = "warning: 1 of 10 boxes reach beyond their image; check that they are x y w h with the centre first"
    assert (warning in notes) == hint
    assert any("1 boxes that reach beyond the image: cut" in note for note in notes) == hint


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("0 320 240 100 50", "2 are lines with coordinates outside of 0 to 1: these look like pixels; divide by"),
        ("0 0.1 0.2 0.3 0.4 0.5", "2 are lines with a confidence: these look like predictions of a model;"),
        ("0,0.1,0.2,0.3,0.4", "2 are lines that are not rows of numbers: write class x y x y ..., numbers with blanks"),
        ("0 0.1 0.2 0.3", "2 are lines that are neither a polygon of 3 points or more nor a box: write at least three"),
        ("0 0.1 0.2 0 0", "2 are boxes without width or height: write the boxes as x y w h, with the centre first"),
    ],
)
def test_a_set_of_odd_lines_is_refused_with_the_likely_cause(tmp_path, line, sentence):
    root = yolo(tmp_path / "src", {"train/1": f"\n{line}\n", "train/2": line, "train/3": "0 0", "val/1": ""})
    message = fault("yolo", root, tmp_path)
    first = "3.txt: line 1" if line == "0 0.1 0.2 0.3 0.4" else "1.txt: line 2"
    assert message.startswith(f"{root}/labels/train/{first}: no line of any label file can be used; ")
    assert sentence.replace("2 are lines that are neither", "3 are lines that are neither") in message


@pytest.mark.parametrize("entry", ["/", "\\", "../" * 40])
def test_a_split_is_not_the_whole_disk(tmp_path, entry):
    folder = write_files(tmp_path, {"data.yaml": yaml.safe_dump({"train": entry, "val": "images", "nc": 1})})
    write_files(folder, {"images/a.jpg": None, "labels/a.txt": ""})
    with pytest.raises(
        UserError, match=r"data\.yaml: train is .*, the root of the disk; name the folder of its images"
    ):
        read_yolo(folder / "data.yaml")


def test_an_outline_that_takes_gigabytes_to_draw_is_left_out_and_counted(tmp_path):
    folder = write_files(tmp_path, {"data.yaml": "train: images\nnames: [cat]\n", "images/a.png": b""})
    Image.new("1", (60_000, 20)).save(folder / "images" / "a.png")
    write_files(folder, {"labels/a.txt": "0 0.1 0.1 0.9 0.1 0.5 0.9\n0" + " 0 0 1 0.9" * 100 + "\n"})
    source = read_yolo(folder)
    assert len(source.parts["train"].annotations) == 1
    assert (
        f"1 objects with an outline of more than 10,000,000 pixels: left out ({folder / 'images/a.png'})"
        in source.notes
    )


def test_labels_and_names_that_contradict_are_refused(tmp_path):
    root = yolo(tmp_path / "src", {"train/1": f"0 {TRIANGLE}\n2 {TRIANGLE}\n", "val/1": ""})
    message = fault("yolo", root, tmp_path)
    assert message == f"{root}/labels/train/1.txt: line 2: class 2 is not one of the 2 names; use 0 to 1"


def test_most_images_without_labels_are_a_warning(tmp_path):
    root = yolo(tmp_path, {"train/1": f"0 {TRIANGLE}", "val/1": f"0 {TRIANGLE}"})
    for number in (2, 3):
        picture(root / f"images/train/{number}.jpg")
    assert not [note for note in read_yolo(root).notes if note.startswith("warning")]  # half of them
    picture(root / "images/train/4.jpg")
    assert read_yolo(root).notes[-1] == (
        "warning: 3 of 5 images have no label file; check that labels/ lies beside images/ and that the files' names "
        "agree"
    )


def test_most_labels_without_images_are_a_warning(tmp_path):
    root = yolo(tmp_path, {"train/1": f"0 {TRIANGLE}", "val/1": f"0 {TRIANGLE}"})
    write_files(root, {f"labels/train/{number}.txt": "" for number in range(2, 4)})
    assert not [note for note in read_yolo(root).notes if note.startswith("warning")]
    write_files(root, {"labels/train/4.txt": ""})
    assert read_yolo(root).notes[-1] == (
        "warning: 3 of 5 label files have no image; check that no images are missing and that the files' names agree"
    )


def test_a_split_of_broken_images(tmp_path):
    root = yolo(tmp_path, {"train/1": f"0 {TRIANGLE}", "val/1": f"0 {TRIANGLE}"})
    write_files(root, {"images/val/1.jpg": b"x"})
    assert objects_of(root) == {"train": {"train/1.jpg": ["cat"]}, "val": {}}
    write_files(root, {"images/train/1.jpg": b"x"})
    with pytest.raises(UserError) as caught:
        read_yolo(root)
    image = f"{root}/images/train/1.jpg"
    assert str(caught.value) == f"{root}/data.yaml: no training image can be used, such as {image}; replace it"


@pytest.mark.parametrize(("number", "share"), [(1, ""), (3, ", as of 3 images")])
def test_a_split_of_labels_in_another_encoding(tmp_path, number, share):
    names = [f"train/{i}" for i in range(number)]
    root = yolo(tmp_path, dict.fromkeys([*names, "val/1"], f"0 {TRIANGLE}"))
    write_files(root, {f"labels/{name}.txt": f"0 {TRIANGLE}".encode("utf-16") for name in names})
    with pytest.raises(UserError) as caught:
        read_yolo(root)
    label = f"{root}/labels/train/0.txt"
    assert str(caught.value) == f"{label}: this label file is not a UTF-8 text{share}; save it as one"


def test_a_set_without_an_object_is_refused(tmp_path):
    root = yolo(tmp_path, {"train/1": "", "val/1": ""})
    with pytest.raises(UserError, match=r"data\.yaml: no label file has an object; check that these are the labels"):
        read_yolo(root)


def test_images_without_any_label_are_a_mistake(tmp_path):
    root = yolo(tmp_path / "src", {"train/1": "", "val/1": ""})
    os.rename(root / "labels", root / "label")
    assert "no image has a label file; labels/ must lie beside images/" in fault("yolo", root, tmp_path)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"names": None}, "'names' must be a list"),
        ({"names": ["cat", "cat"]}, "'cat' occurs more than once"),
        ({"train": None}, "the entry 'train' is missing"),
        ({"train": "images/other"}, "images/other, which is not in"),
        ({"train": "../../../gone"}, "gone, which is not in"),
        ({"train": {"a": "b"}}, "must be a folder"),
        ({"train": "outside.txt"}, "leads out of"),
    ],
)
def test_faults_of_data_yaml_through_the_command(tmp_path, changes, problem):
    root = yolo(tmp_path / "src", {"train/1": f"0 {TRIANGLE}", "val/1": ""}, **changes)
    picture(tmp_path / "private.jpg")
    (root / "outside.txt").write_text("../private.jpg\n")
    assert problem in fault("yolo", root, tmp_path)


def test_links_that_lead_out_are_refused(tmp_path):
    root = yolo(tmp_path / "src", {"train/1": f"0 {TRIANGLE}", "val/1": ""})
    (root / "images/train/2.jpg").symlink_to(picture(tmp_path / "private.jpg"))
    assert "leads out of" in fault("yolo", root, tmp_path)


def test_progress_counts_the_images(tmp_path):
    done = []
    read_yolo(yolo(tmp_path, {"train/1": f"0 {TRIANGLE}", "train/2": "", "val/1": ""}), done.append)
    assert done == [1, 2, 3]


# ---------------------------------------------------------------------------------------------------------
# Random sets


shape = st.lists(st.tuples(st.integers(0, 80), st.integers(0, 40)), min_size=3, max_size=6)
line = st.tuples(st.integers(0, 2), shape)
sets = st.dictionaries(
    st.tuples(st.sampled_from(["train", "val"]), st.text("abé. ", min_size=1, max_size=4).map(lambda t: f"x{t}x")),
    st.lists(line, max_size=3),
    max_size=5,
)


@given(sets, st.booleans())
def test_random_sets_come_back(tmp_path_factory, images, roboflow):
    """Every object that has an extent comes back with its class and points, whatever the layout."""
    root = tmp_path_factory.mktemp("set")
    images = {("train", "first"): [(0, [(0, 0), (8, 0), (8, 8)])]} | images
    for (split, name), objects in images.items():
        folders = (f"{split}/images", f"{split}/labels") if roboflow else (f"images/{split}", f"labels/{split}")
        picture(root / folders[0] / f"{name}.jpg")
        rows = [
            " ".join(map(repr, (number, *(v for x, y in points for v in (x / 80, y / 40)))))
            for number, points in objects
        ]
        write_files(root, {f"{folders[1]}/{name}.txt": "\n".join(rows)})
    entries = {
        split: f"../{split}/images" if roboflow else f"images/{split}" for split in {split for split, _ in images}
    }
    (root / "data.yaml").write_text(yaml.safe_dump(entries | {"names": ["a", "b", "c"]}))
    found = read_yolo(root)
    back = {}
    for split, part in found.parts.items():
        for image in part.images:
            rows = [row for row in part.annotations if row["image_id"] == image["id"]]
            key = (split, image["file_name"].removeprefix(f"{split}/").removesuffix(".jpg"))
            back[key] = [(row["category_id"] - 1, row["segmentation"]) for row in rows]
    solid = {
        key: [
            (n, [[float(v) for point in p for v in point]])
            for n, p in objects
            if all(len(set(c)) > 1 for c in zip(*p, strict=True))
        ]
        for key, objects in images.items()
    }
    assert back == solid
    without = sum(map(len, images.values())) - sum(map(len, solid.values()))
    assert any(note.startswith(f"{without} objects without extent") for note in found.notes) == bool(without)


# ---------------------------------------------------------------------------------------------------------
# Photographs


def test_real_photographs_to_yolo_and_back(shared, tmp_path):
    """Objects of one polygon survive the way to normalised text and back."""
    source = shared / "data" / "coco128-lvis"
    theirs = open_data(str(source), show=False)
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


# ---------------------------------------------------------------------------------------------------------
# Recognition


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"data.yaml": "names: [a]\ntrain: images/train"}, True),
        ({"coco.yml": "nc: 3\nTrain: images/train"}, True),
        ({"set/data.yaml": "names: [a]\ntrain: images/train"}, True),
        ({"images/train/a.jpg": b"", "labels/train/a.txt": ""}, True),
        ({"images/a.jpg": b"", "labels/a.txt": "", "classes.txt": "a"}, True),
        ({"train/Images/a.jpg": b"", "train/Labels/a.TXT": ""}, True),
        ({"obj_train_data/a.jpg": b"", "obj_train_data/a.txt": "", "obj.names": "a"}, True),
        ({"a.jpg": b"", "a.txt": "", "classes.txt": "a"}, True),
        ({"data.yaml": "[", "images/a.jpg": b"", "labels/a.txt": ""}, True),  # so that the reader tells the fault
        ({"data.yaml": "train: train.json\nval: val.json\nimages: images"}, False),
        ({"images/train/a.jpg": b"", "train.json": "{}"}, False),
        ({"images/a.jpg": b"", "labels/a.xml": ""}, False),
        ({"images/a.jpg": b"", "classes.txt": "1 a", "images.txt": "1 a.jpg", "images/README.txt": ""}, False),
        ({"a.jpg": b"", "a.txt": ""}, False),
        ({"data.yaml": "["}, False),
        ({}, False),
    ],
)
def test_a_yolo_folder_is_recognised(tmp_path, files, expected):
    assert is_yolo(write_files(tmp_path, files)) == expected


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("data.yaml", "names: [a]\ntrain: x\nval: y", True),
        ("my.yml", "names: [a]\ntrain: [x]", True),
        ("obj.data", "train = train.txt\nnames = obj.names", True),
        ("d.yaml", "train: train.json\nval: val.json\nimages: images", False),
        ("d.yaml", "names: [a]", False),
        ("d.yaml", "train: {", False),
        ("d.yaml", "", False),
        ("d.json", "{}", False),
        ("d.json", '{"names": ["a"], "train": "x"}', False),
        ("d.jpg", b"\xff\xd8", False),
    ],
)
def test_a_yolo_file_is_recognised(tmp_path, name, text, expected):
    assert is_yolo(write_files(tmp_path, {name: text}) / name) == expected
    assert not is_yolo(tmp_path / "gone")
