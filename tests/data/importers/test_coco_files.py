import gzip
import json

import pytest
from foreign_files import coco_set, converted, picture

from tailseg.data.importers.coco_files import as_downloaded, coco_files, is_coco, root_of, unreadable
from tailseg.errors import UserError

EMPTY = json.dumps({"images": [], "annotations": [], "categories": []})


def folder(root, *names, broken=(), text="{"):
    for name in (*names, *broken):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text if name in broken else EMPTY)
    return root


def chosen(root):
    return {split: str(path.relative_to(root)) for split, path in coco_files(root).by_split.items()}


@pytest.mark.parametrize(
    ("names", "train", "val"),
    [
        (["x.json"], "x.json", None),
        (["instances_train2017.json", "instances_val2017.json"], "instances_train2017.json", "instances_val2017.json"),
        (["train.json", "train_old.json", "val.json"], "train.json", "val.json"),
        (["train.json", "annotations/train.json", "val.json"], "train.json", "val.json"),
        (["train.json", "val.json", "minival.json", "valminusminival.json"], "train.json", "val.json"),
        (["train.json", "minival.json"], "train.json", "minival.json"),
        (["train.json", "val.json", "trainval.json", "test.json"], "train.json", "val.json"),
        (["annotations_trainval.json", "annotations_test.json"], "annotations_trainval.json", None),
        (["default.json", "val.json", "test.json"], "default.json", "val.json"),
        (["captions_train.json", "train.json", "person_keypoints_val.json"], "train.json", None),
        (["stuff_train.json", "stuff_val.json"], "stuff_train.json", "stuff_val.json"),
        (["train/a.coco.json", "valid/a.coco.json", "test/a.coco.json"], "train/a.coco.json", "valid/a.coco.json"),
        # Datumaro, FiftyOne's zoo, TACO
        (["instances_train.json", "labels_train.json", "image_info_train.json"], "instances_train.json", None),
        (["train/labels.json", "raw/instances_train.json"], "train/labels.json", None),
        (["raw/train.json", "raw/val.json"], "raw/train.json", "raw/val.json"),
        (["annotations.json", "annotations_unofficial.json"], "annotations.json", None),
        (["Train.JSON", "Val.JSON"], "Train.JSON", "Val.JSON"),
        (["train.json.gz", "val.json.gz"], "train.json.gz", "val.json.gz"),
    ],
)  # fmt: skip
def test_the_file_of_each_split(tmp_path, names, train, val):
    found = coco_files(folder(tmp_path, *names))
    assert chosen(tmp_path) == {"train": train} | ({"val": val} if val else {})
    left_out = [name for name in sorted(names) if name not in (train, val)]
    assert found.notes == ([f"other annotation files, left out: {', '.join(left_out)}"] if left_out else [])


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["train_a.json", "train_b.json", "val.json"], "train_a.json and train_b.json both look like the train split"),
        (["a/train.json", "b/train.json"], "a/train.json and b/train.json both look like the train split"),
        (
            ["coco_train.json", "lvis_train.json", "val.json"],
            "coco_train.json and lvis_train.json both look like the train split",
        ),
        (["train.json", "val.json", "valid.json"], "val.json and valid.json both look like the val split"),
        (["a.json", "b.json"], "no file is called train, of a.json, b.json"),
        (["val.json", "test.json"], "no file is called train, of test.json, val.json"),
    ],
)
def test_several_files_that_could_be_meant(tmp_path, names, problem):
    with pytest.raises(UserError) as caught:
        coco_files(folder(tmp_path, *names))
    fix = "; give one instead of the folder, or write a YAML file with the entries train, val and images"
    assert str(caught.value) == f"{tmp_path}: {problem}{fix}"


@pytest.mark.parametrize("text", ["", "{", "[]", "<html>404</html>", "version https://git-lfs.github.com/spec/v1\n"])
@pytest.mark.parametrize(
    ("good", "broken"),
    [
        (["val.json"], "train.json"),
        (["annotations/instances_train2017.json"], "annotations/instances_val2017.json"),
        (["train/_annotations.coco.json"], "valid/_annotations.coco.json"),
        ([], "x.json"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_before_the_other_split_is_taken_for_all(tmp_path, text, good, broken):
    root = folder(tmp_path, *good, broken=[broken], text=text)
    with pytest.raises(UserError) as caught:
        coco_files(root)
    assert str(caught.value).startswith(f"{root / broken}: ")
    assert [str(error) for error in unreadable(root)] == [str(caught.value)]


def test_files_that_cannot_be_read_beside_the_right_ones_are_named(tmp_path):
    names = ("train.json", "val.json")
    broken = ["train_log.json", "val_detections.json", "notes.json", "train_old.json", "test.json"]
    root = folder(tmp_path, *names, broken=broken, text="[]")
    assert chosen(root) == {"train": "train.json", "val": "val.json"}
    (note,) = coco_files(root).notes
    assert note == "files that cannot be read as JSON objects, left out: notes.json, test.json, train_old.json"
    assert chosen(folder(tmp_path / "one", "a.json", broken=["val_results.json", "x.json"])) == {"train": "a.json"}


def test_a_file_is_its_own_set(tmp_path):
    assert chosen(folder(tmp_path, "captions_val.json")) == {"train": "captions_val.json"}
    assert coco_files(tmp_path / "captions_val.json").by_split == {"train": tmp_path / "captions_val.json"}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"images": []}, True),
        ({"info": {}, "annotations": [{"image_id": 3}]}, True),
        ({"annotations": [], "images": []}, True),
        ({"annotations": []}, False),
        ({"image": {"file_name": "a.jpg"}, "annotations": [{"id": 1, "segmentation": {}}]}, False),  # SA-1B
        ({"images": {}}, False),
        ({"shapes": [], "images": []}, False),
        ({"items": [], "annotations": []}, False),
        ([{"image_id": 3}], False),
        ("images", False),
    ],
)
def test_what_is_coco(tmp_path, content, told):
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert is_coco(tmp_path / "a.json") is told


def test_packed_files_are_converted(tmp_path):
    root = coco_set(coco_set(tmp_path / "src", "train.json", "images", (1, 2)), "val.json", "images", (3,))
    for name in ("train", "val"):
        path = root / f"{name}.json"
        (root / f"{name}.json.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    splits, _ = converted("coco", root, tmp_path)
    assert (splits.train.image_ids.tolist(), splits.val.image_ids.tolist()) == ([1, 2], [3])


def test_the_folder_that_images_are_searched_in(tmp_path):
    assert root_of(tmp_path / "a.json") == tmp_path
    assert root_of(tmp_path / "Annotations" / "a.json") == tmp_path


def test_coco_and_lvis_as_downloaded_need_no_import(tmp_path):
    files = ("annotations/instances_train2017.json", "annotations/instances_val2017.json")
    root = coco_set(coco_set(tmp_path, files[0], "train2017", (1, 2)), files[1], "val2017", (3,))
    assert as_downloaded(root) == (root / files[0], root / files[1], root)
    (root / "images").mkdir()
    for name in ("train2017", "val2017"):
        (root / name).rename(root / "images" / name)
    assert as_downloaded(root) == (root / files[0], root / files[1], root / "images")
    (root / files[1]).unlink()
    assert as_downloaded(root) is None
    assert as_downloaded(coco_set(tmp_path / "other", "train.json", "images", (1,))) is None


def test_who_only_evaluates_has_no_training_images_nor_their_file(tmp_path):
    train, val = "annotations/instances_train2017.json", "annotations/instances_val2017.json"
    root = coco_set(coco_set(tmp_path, train, "train2017", (1, 2)), val, "val2017", (3,))
    for path in (root / "train2017").iterdir():
        path.unlink()
    (root / "train2017").rmdir()
    assert as_downloaded(root) == (root / train, root / val, root)
    (root / train).unlink()
    assert as_downloaded(root) == (None, root / val, root)
    picture(root / "val2017" / "x.jpg")
    (root / val).rename(root / "annotations/x.json")
    assert as_downloaded(root) is None


@pytest.mark.parametrize("link", ["a/deep", "z/deep"])
def test_a_file_that_a_link_to_its_folder_shows_again_is_one(tmp_path, link):
    root = coco_set(tmp_path / "src", "m/train.json", "images", (1,))
    (root / link).parent.mkdir()
    (root / link).symlink_to(root / "m")
    assert coco_files(root).by_split == {"train": root / "m" / "train.json"}
    assert coco_files(root).notes == []
