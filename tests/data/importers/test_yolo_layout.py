import os
import unicodedata

import pytest
from foreign_files import write_files

from tailseg.data.importers.foreign import LeftOut
from tailseg.data.importers.yolo_labels import LabelFiles
from tailseg.data.importers.yolo_layout import find_layout
from tailseg.errors import UserError

SPLIT = ("images/train/1.jpg", "images/train/2.jpg", "images/val/3.jpg")


def layout_of(root, images, entries: str | None, texts=None, names="names: [cat]\n"):
    """The images of each split by their paths below the root, the notes, and what was left out."""
    write_files(root, dict.fromkeys(images, b"") | (texts or {}))
    if entries is not None:
        write_files(root, {"data.yaml": names + entries.format(root=root)})
    found = LeftOut()
    layout = find_layout(root, found)
    parts = {
        split: sorted(str(path.relative_to(layout.root)) for path in part) for split, part in layout.images.items()
    }
    for part in layout.images.values():
        assert all(path.is_relative_to(image_root) for path, image_root in part.items())
    return parts, layout.notes, found.counts


def fault_of(*arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        layout_of(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------
# Entries of data.yaml


@pytest.mark.parametrize(
    "entries",
    [
        "train: images/train\nval: images/val",
        "train: images/train\nvalid: images/val",
        "Train: images/train\nValidation: images/val",
        "path: .\ntrain: ./images/train/\nval: images/../images/val",
        "path: {root}\ntrain: images/train\nval: images/val",
        "path: ./images\ntrain: train\nval: val",
        "path: set\ntrain: images/train\nval: images/val",  # the folder's own name
        "path: ../set\ntrain: images/train\nval: images/val",
        "path: images\ntrain: images/train\nval: images/val",  # relative to the file after all
        "train: {root}/images/train\nval: {root}/images/val",
        "train: ../images/train\nval: ../images/val",  # as Roboflow writes
        "train: set/images/train\nval: set/images/val",
        "train: ../datasets/set/images/train\nval: ../datasets/set/images/val",  # as YOLOv5 does
        "train: images\\train\nval: .\\images\\val\\",
        "train: [images/train]\nval: [images/val]",
        "train: [images/train/1.txt, images/train/2.txt]\nval: val.txt",
        "train: train.txt\nval: val.txt",
        "train: lists/train.txt\nval: val.txt",
        "train: Images/Train\nval: images/VAL",
    ],
)
def test_entries_are_found(tmp_path, entries):
    lists = {
        "train.txt": "\ufeff./images/train/1.jpg\r\n\r\nimages\\train\\2.jpg\r\n",
        "val.txt": "images/val/3.jpg",
        "images/train/1.txt": "./1.jpg",
        "images/train/2.txt": "2.jpg\n",
        "lists/train.txt": "../images/train/1.jpg\nimages/train/2.JPG",
    }
    parts, notes, counts = layout_of(tmp_path / "set", SPLIT, entries, lists)
    paths = {split: [path.rpartition("/")[2] for path in part] for split, part in parts.items()}
    assert paths == {"train": ["1.jpg", "2.jpg"], "val": ["3.jpg"]}
    assert (notes, counts) == ([], {})


@pytest.mark.parametrize(
    ("path", "train", "note"),
    [
        ("/content/set", "images/train", "its path /content/set is not here; the file's own folder was taken"),
        ("../datasets/coco8", "images/train", "its path ../datasets/coco8 is not here"),
        ("D:\\\\sets\\\\coco8", "images/train", "its path D:\\\\sets\\\\coco8 is not here"),
        ("", "/content/set/images/train", "train is /content/set/images/train, which is not here; {}/images/train was"),
        ("", "C:\\\\me\\\\set\\\\images\\\\train", "is not here; {}/images/train was taken"),
    ],
)
def test_places_on_another_machine(tmp_path, path, train, note):
    parts, notes, _ = layout_of(tmp_path, SPLIT, f"path: '{path}'\ntrain: '{train}'\nval: images/val")
    assert parts == {"train": ["images/train/1.jpg", "images/train/2.jpg"], "val": ["images/val/3.jpg"]}
    assert len(notes) == 1
    assert note.format(tmp_path) in notes[0]


def test_the_end_of_a_path_on_another_machine(tmp_path):
    """As Ultralytics' own files, which lie beside the set's folder."""
    images = [f"coco8/{name}" for name in SPLIT]
    parts, notes, _ = layout_of(tmp_path, images, "path: ../datasets/coco8\ntrain: images/train\nval: images/val")
    assert parts == {"train": ["images/train/1.jpg", "images/train/2.jpg"], "val": ["images/val/3.jpg"]}
    assert notes == [f"{tmp_path}/data.yaml: its path ../datasets/coco8 is not here; {tmp_path}/coco8 was taken"]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_unicode_forms_of_folders(tmp_path, form):
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    image = f"{unicodedata.normalize(form, 'Bücher')}/images/1.jpg"
    entry = f"train: {unicodedata.normalize(other, 'Bücher')}/images"
    assert layout_of(tmp_path, [image], entry)[0] == {"train": [image]}


def test_of_two_entries_that_differ_in_case_neither_is_meant(tmp_path):
    assert "images/Train, which is not in" in fault_of(
        tmp_path, ("images/train/1.jpg", "images/TRAIN/2.jpg"), "train: images/Train"
    )


@pytest.mark.parametrize(
    "line", ["/content/set/images/train/1.jpg", "C:\\set\\images\\train\\1.jpg", "data/images/train/1.jpg"]
)
def test_listed_places_on_another_machine(tmp_path, line):
    parts, _, _ = layout_of(tmp_path, SPLIT, "train: train.txt\nval: images/val", {"train.txt": line})
    assert parts["train"] == ["images/train/1.jpg"]


def test_images_outside_of_the_files_folder_by_the_users_own_statement(tmp_path):
    write_files(tmp_path, dict.fromkeys((f"disk/{name}" for name in SPLIT), b"") | {"disk/labels/train/1.txt": ""})
    entries = f"path: {tmp_path}/disk\ntrain: images/train\nval: images/val"
    parts, notes, _ = layout_of(tmp_path / "yaml", (), entries)
    assert parts == {"train": ["images/train/1.jpg", "images/train/2.jpg"], "val": ["images/val/3.jpg"]}
    assert notes == []
    entries = f"train: {tmp_path}/disk/images/train\nval: ../disk/images/val"
    parts, notes, _ = layout_of(tmp_path / "yaml", (), entries)
    assert parts == {"train": ["images/train/1.jpg", "images/train/2.jpg"], "val": ["images/val/3.jpg"]}
    file = tmp_path / "yaml/data.yaml"
    assert notes == [
        f"{file}: train is {tmp_path}/disk/images/train, outside of the file's folder",
        f"{file}: val is {tmp_path}/disk/images/val, outside of the file's folder",
    ]


def test_splits_on_two_disks(tmp_path, monkeypatch):
    write_files(tmp_path, {"one/images/1.jpg": b"", "set/val/2.jpg": b""})
    entries = f"train: {tmp_path}/one/images\nval: val"
    parts, _, _ = layout_of(tmp_path / "set", (), entries)
    assert parts == {"train": ["one/images/1.jpg"], "val": ["set/val/2.jpg"]}
    monkeypatch.chdir(tmp_path / "set")
    layout = find_layout(type(tmp_path)("data.yaml"), LeftOut())
    assert layout.root == tmp_path
    assert [*layout.images["val"]] == [tmp_path / "set/val/2.jpg"]


def test_a_relative_source(tmp_path, monkeypatch):
    write_files(
        tmp_path, dict.fromkeys(SPLIT, b"") | {"data.yaml": "names: [a]\ntrain: ../images/train\nval: images/val"}
    )
    monkeypatch.chdir(tmp_path)
    for source in (".", "data.yaml"):
        layout = find_layout(type(tmp_path)(source), LeftOut())
        assert [str(path) for path in layout.images["train"]] == ["images/train/1.jpg", "images/train/2.jpg"]


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ("val: images/val", "the entry 'train' is missing; add it, with the folder of the training images"),
        ("train: images/other", "train is images/other, which is not in {}; put data.yaml into the folder that holds"),
        ("train: images/train\nval: gone", "val is gone, which is not in {}; put data.yaml into the folder that holds"),
        ("train: " + "n" * 5000, "which is not in"),
        ('train: "a\\0b"', "which is not in"),
        ("train: /gone", "train is /gone, which is not in {}"),
        ("train: C:\\gone", "train is C:\\gone, which is not in {}"),
        ("train: ../../../../../../gone", "which is not in {}"),
        ("train: labels", "train has no images; check the folder it names"),
        ("train: images/train\nval: empty.txt", "val has no images; check the folder it names"),
    ],
)
def test_entries_at_fault(tmp_path, entries, sentence):
    message = fault_of(tmp_path, SPLIT, entries, {"labels/x.txt": "", "empty.txt": "\n \n"})
    assert message.startswith(f"{tmp_path / 'data.yaml'}: ")
    assert sentence.format(tmp_path) in message


def test_a_test_split_is_counted_and_need_not_be_there(tmp_path):
    images = (*SPLIT, "images/test/4.jpg", "images/test/5.jpg")
    entries = "train: images/train\nval: images/val\ntest: images/test"
    parts, _, counts = layout_of(tmp_path, images, entries, {"test.txt": "gone.jpg"})
    assert sum(map(len, parts.values())) == 3
    assert counts == {"images of the test split: left out": 2}
    for entry in ("../test/images", "images/val", "test.txt"):
        entries = f"train: images/train\nval: images/val\ntest: {entry}"
        assert layout_of(tmp_path, (), entries)[1:] == ([], {})


@pytest.mark.parametrize(
    ("train", "val"), [("images/train", "images/val"), ("train/images", "valid"), ("train", "val")]
)
def test_validation_that_no_entry_names_is_told(tmp_path, train, val):
    parts, notes, _ = layout_of(tmp_path, (f"{train}/1.jpg", f"{val}/2.jpg"), f"train: {train}")
    assert parts == {"train": [f"{train}/1.jpg"]}
    assert notes == [f"{tmp_path}/data.yaml: no entry names {tmp_path / val}: left out; add it as 'val'"]


def test_listed_images_that_are_not_there(tmp_path):
    text = "images/train/1.jpg\nimages/train/9.jpg\n" + "n" * 5000 + ".jpg\n\0.jpg\n../9.jpg"
    parts, _, counts = layout_of(tmp_path, SPLIT, "train: train.txt\nval: images/val", {"train.txt": text})
    assert parts["train"] == ["images/train/1.jpg"]
    assert counts == {"images that a list names and that are not there: left out": 4}
    message = fault_of(tmp_path, (), "train: train.txt\nval: images/val", {"train.txt": "\n9.jpg\n8.jpg"})
    assert message == f"{tmp_path}/train.txt: line 2: 9.jpg does not exist; put the image there or remove the line"


# ---------------------------------------------------------------------------------------------------------
# Nothing leads out, no split leaks


@pytest.mark.parametrize("line", ["../private.jpg", "{}/private.jpg", "images/../../private.jpg", "..\\private.jpg"])
def test_a_list_may_not_lead_out(tmp_path, line):
    write_files(tmp_path, {"private.jpg": b""})
    texts = {"train.txt": f"images/train/1.jpg\n{line.format(tmp_path)}"}
    message = fault_of(tmp_path / "set", SPLIT, "train: train.txt\nval: images/val", texts)
    assert message.startswith(f"{tmp_path}/set/train.txt: line 2: ")
    assert f"leads out of {tmp_path}/set; state the folder that holds all images as 'path' in data.yaml" in message


@pytest.mark.parametrize("link", ["images/train/9.jpg", "images/train/more", "images/val", "listed.jpg"])
def test_links_may_not_lead_out(tmp_path, link):
    write_files(tmp_path, {"private/1.jpg": b""})
    root = write_files(tmp_path / "set", dict.fromkeys(SPLIT[:2], b""))
    os.symlink(tmp_path / ("private/1.jpg" if link.endswith(".jpg") else "private"), root / link)
    write_files(root, {"list.txt": "listed.jpg" if "listed" in link else "images/train/1.jpg", "other/3.jpg": b""})
    entries = f"train: [images/train, list.txt]\nval: {'images/val' if 'val' in link else 'other'}"
    message = fault_of(root, (), entries)
    assert f"{root / link} is a link that leads out of {root}; put the " in message


@pytest.mark.parametrize("entries", ["train: images/train\nval: images/val", None])
def test_a_folder_of_the_set_may_be_a_link(tmp_path, entries):
    """People keep images on another disk, and labels beside the link."""
    write_files(tmp_path / "disk", dict.fromkeys((name.removeprefix("images/") for name in SPLIT), b""))
    root = write_files(tmp_path / "set", {"labels/train/1.txt": ""})
    os.symlink(tmp_path / "disk", root / "images")
    parts, _, _ = layout_of(root, (), entries)
    assert parts == {"train": ["images/train/1.jpg", "images/train/2.jpg"], "val": ["images/val/3.jpg"]}
    assert LabelFiles(root).find(root / "images/train/1.jpg") == root / "labels/train/1.txt"


@pytest.mark.parametrize("above", ["/content/training", "/home/me/test sets", "C:\\validation", "/content/drive"])
def test_folders_of_another_machine_may_be_called_like_splits(tmp_path, above):
    root = write_files(tmp_path, dict.fromkeys(("data/obj/1.jpg", "data/obj/2.jpg"), b""))
    texts = {"train.txt": f"{above}/data/obj/1.jpg", "val.txt": f"{above}/data/obj/2.jpg"}
    parts, notes, _ = layout_of(root, (), "train: train.txt\nval: val.txt", texts)
    assert (parts, notes) == ({"train": ["data/obj/1.jpg"], "val": ["data/obj/2.jpg"]}, [])
    (root / "val.txt").unlink()
    parts, notes, _ = layout_of(root, (), f"train: '{above}/data'")
    assert parts == {"train": ["data/obj/1.jpg", "data/obj/2.jpg"]}
    assert notes == [f"{root}/data.yaml: train is {above}/data, which is not here; {root}/data was taken"]


def test_links_inside_are_followed(tmp_path):
    root = write_files(tmp_path, {"all/1.jpg": b"", "all/2.jpg": b"", "images/val/3.jpg": b""})
    os.symlink("../all", root / "images/train")
    assert layout_of(root, (), "train: images/train\nval: images/val")[0]["train"] == [
        "images/train/1.jpg",
        "images/train/2.jpg",
    ]


def test_a_split_that_is_a_link_inside_is_followed_without_a_list_of_splits(tmp_path):
    root = write_files(tmp_path, {"images/train/1.jpg": b"", "pool/2.jpg": b"", "labels/train/1.txt": ""})
    os.symlink("../pool", root / "images/val")
    parts, _, counts = layout_of(root, (), None)
    assert (parts, counts) == ({"train": ["images/train/1.jpg"], "val": ["images/val/2.jpg"]}, {})
    write_files(tmp_path.parent / f"{tmp_path.name}_other", {"3.jpg": b""})
    (root / "images/val").unlink()
    os.symlink(tmp_path.parent / f"{tmp_path.name}_other", root / "images/val")
    message = fault_of(root, (), None)
    assert message == f"{root}/images/val is a link that leads out of {root}; put the folder itself there"


@pytest.mark.parametrize(
    "entries",
    [
        "train: images/train\nval: images/train",
        "train: images/train\nval: ./images/train/",
        "train: images/train\nval: train.txt",
        "train: [images/train]\nval: [images/train/1.jpg.txt, train.txt]",
    ],
)
def test_train_and_val_the_same_are_one_set(tmp_path, entries):
    texts = {"train.txt": "images/train/1.jpg\nimages/train/2.jpg", "images/train/1.jpg.txt": "1.jpg"}
    parts, notes, _ = layout_of(tmp_path, SPLIT, entries, texts)
    assert parts == {"train": ["images/train/1.jpg", "images/train/2.jpg"]}
    assert notes == [f"{tmp_path}/data.yaml: train and val are the same images; they are taken as one set"]


@pytest.mark.parametrize(
    ("train", "val", "parts", "left_out"),
    [
        ("1 2", "2 3", ("1 2", "3"), "images that are in both train and val: left out of validation"),
        ("1 2 3", "3", ("1 2", "3"), "images that are in both train and val: left out of training"),
        ("1", "1 2 3", ("1", "2 3"), "images that are in both train and val: left out of validation"),
        ("1 1 2", "3", ("1 2", "3"), "images named twice for train: taken once"),
    ],
)
def test_an_image_is_in_one_split(tmp_path, train, val, parts, left_out):
    texts = {
        f"{split}.txt": "\n".join(f"{name}.jpg" for name in names.split())
        for split, names in zip(("train", "val"), (train, val), strict=True)
    }
    found, _, counts = layout_of(tmp_path, ("1.jpg", "2.jpg", "3.jpg"), "train: train.txt\nval: val.txt", texts)
    assert tuple(" ".join(name[0] for name in found[split]) for split in ("train", "val")) == parts
    assert counts == {left_out: 1}


def test_an_image_that_another_split_links_to_is_in_one_split(tmp_path):
    root = write_files(tmp_path, {"train/1.jpg": b"", "train/2.jpg": b"", "val/3.jpg": b""})
    os.symlink("../train/1.jpg", root / "val/1.jpg")
    parts, _, counts = layout_of(root, (), "train: train\nval: val")
    assert parts == {"train": ["train/1.jpg", "train/2.jpg"], "val": ["val/3.jpg"]}
    assert counts == {"images that are in both train and val: left out of validation": 1}


def test_validation_inside_of_the_training_folder_leaves_training(tmp_path):
    parts, _, _ = layout_of(tmp_path, SPLIT, "train: images\nval: images/val")
    assert parts == {"train": ["images/train/1.jpg", "images/train/2.jpg"], "val": ["images/val/3.jpg"]}


# ---------------------------------------------------------------------------------------------------------
# Without data.yaml


@pytest.mark.parametrize(
    ("images", "train", "val"),
    [
        (("images/train/1.jpg", "images/val/2.jpg"), 1, 1),
        (("train/images/1.jpg", "valid/images/2.jpg"), 1, 1),
        (("train/1.jpg", "validation/2.jpg", "validation/3.jpg"), 1, 2),
        (("images/train2017/a/1.jpg", "images/train2017/b/2.jpg", "images/val2017/3.jpg"), 2, 1),
        (("obj_train_data/1.jpg", "obj_valid_data/2.jpg"), 1, 1),
        (("Images/Train/1.jpg", "Images/latest_val/2.jpg"), 1, 1),
        (("images/1.jpg", "images/2.jpg"), 2, 0),
        (("images/carnival/1.jpg", "images/strain/2.jpg"), 2, 0),
        (("1.jpg", "deep/2.jpg"), 2, 0),
        (("images/1.jpg", "images/val/2.jpg"), 1, 1),  # what is not for validation is for training
    ],
)
def test_splits_by_folders(tmp_path, images, train, val):
    parts, notes, counts = layout_of(tmp_path, images, None)
    assert (len(parts["train"]), len(parts.get("val", ()))) == (train, val)
    assert (notes, counts) == ([], {})


@pytest.mark.parametrize(
    ("images", "train", "left_out", "note"),
    [
        (
            ("images/train/1.jpg", "train.jpg", "runs/train/2.jpg"),
            1,
            "pictures outside of the folders called images: left out",
            2,
        ),
        (("train/1.jpg", "2.jpg"), 1, "images outside of the folders of splits: left out", 1),
        (("train/1.jpg", "test/2.jpg"), 1, "images of the test split: left out", 1),
    ],
)
def test_images_that_are_in_no_split_are_counted(tmp_path, images, train, left_out, note):
    parts, _, counts = layout_of(tmp_path, images, None)
    assert len(parts["train"]) == train
    assert counts == {left_out: note}


def test_one_folder_of_another_split_is_a_whole_set(tmp_path):
    parts, notes, _ = layout_of(tmp_path, ("valid/images/1.jpg", "valid/images/2.jpg"), None)
    assert parts == {"train": ["valid/images/1.jpg", "valid/images/2.jpg"]}
    assert notes == [f"{tmp_path}: no folder is called train; the images of val were taken for training"]


def test_data_yaml_without_splits_is_read_by_folders(tmp_path):
    assert layout_of(tmp_path, SPLIT, "nc: 1")[0] == {"train": [*SPLIT[:2]], "val": [SPLIT[2]]}


def test_lists_in_the_folder_tell_the_splits(tmp_path):
    texts = {"autosplit_train.txt": "./images/1.jpg\n./images/2.jpg", "autosplit_val.txt": "./images/3.jpg"}
    parts, _, _ = layout_of(tmp_path, ("images/1.jpg", "images/2.jpg", "images/3.jpg"), None, texts)
    assert parts == {"train": ["images/1.jpg", "images/2.jpg"], "val": ["images/3.jpg"]}
    texts = {"train.txt": "0 0.5 0.5 0.1 0.1", "val.txt": ""}  # labels of train.jpg
    parts, _, _ = layout_of(tmp_path / "beside", ("train.jpg", "val.jpg"), None, texts)
    assert parts == {"train": ["train.jpg", "val.jpg"]}


def test_darknet_and_cvat(tmp_path):
    texts = {
        "obj.data": "classes = 2\ntrain = data/train.txt\nvalid=data/valid.txt\nnames = data/obj.names\nbackup = b/\n",
        "obj.names": "cat\nowl\n",
        "train.txt": "data/obj_train_data/1.jpg\n",
        "valid.txt": "data/obj_valid_data/2.jpg\n",
    }
    parts, notes, counts = layout_of(tmp_path, ("obj_train_data/1.jpg", "obj_valid_data/2.jpg"), None, texts)
    assert parts == {"train": ["obj_train_data/1.jpg"], "val": ["obj_valid_data/2.jpg"]}
    assert (notes, counts) == ([], {})
    assert find_layout(tmp_path / "obj.data", LeftOut()).names == {0: "cat", 1: "owl"}


def test_names_of_the_file_or_beside_it(tmp_path):
    write_files(tmp_path, {"images/1.jpg": b"", "labels/classes.txt": "dog"})
    assert find_layout(tmp_path, LeftOut()).names == {0: "dog"}
    write_files(tmp_path, {"data.yaml": "train: images"})
    assert find_layout(tmp_path, LeftOut()).names == {0: "dog"}
    write_files(tmp_path, {"data.yaml": "train: images\nnames: my.names\nkpt_shape: [2, 3]", "my.names": "cat\nowl"})
    layout = find_layout(tmp_path, LeftOut())
    assert (layout.names, layout.keypoint_numbers) == ({0: "cat", 1: "owl"}, 6)


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "{}: there is neither a data.yaml nor an image in it; give the folder of a YOLO set"),
        ({"x.jpg": b"", "data.yaml": "train: ."}, "{}/data.yaml: 'names' must be a list of class names, or map 0, 1,"),
    ],
)
def test_folders_at_fault(tmp_path, files, sentence):
    with pytest.raises(UserError) as caught:
        find_layout(write_files(tmp_path, files), LeftOut())
    assert str(caught.value).startswith(sentence.format(tmp_path))
