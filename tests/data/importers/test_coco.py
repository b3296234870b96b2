import json

import pytest
from foreign_files import coco_set, converted, fault, picture
from PIL import Image

from tailseg.data.importers.coco import read_coco
from tailseg.errors import UserError


@pytest.mark.parametrize(
    ("files", "folders"),
    [
        (("annotations/instances_train2017.json", "annotations/instances_val2017.json"), ("train2017", "val2017")),
        (("train/_annotations.coco.json", "valid/_annotations.coco.json"), ("train", "valid")),
        (("train.json", "val.json"), ("images", "images")),
    ],
)
def test_coco_layouts(tmp_path, files, folders):
    root = coco_set(coco_set(tmp_path / "src", files[0], folders[0], (1, 2)), files[1], folders[1], (3,))
    splits, _ = converted("coco", root, tmp_path)
    assert (len(splits.train), len(splits.val)) == (2, 1)
    assert splits.train.boxes.tolist() == [[20, 10, 60, 30]] * 2
    assert [(c.id, c.name, c.frequency) for c in splits.val.categories] == [(17, "cat", "r")]


def test_coco_splits_with_the_same_file_names_stay_apart(tmp_path):
    root = coco_set(coco_set(tmp_path / "src", "train.json", "train2017", (1,)), "val.json", "val2017", (1,))
    Image.new("RGB", (80, 40), "white").save(root / "val2017" / "1.jpg")
    splits, _ = converted("coco", root, tmp_path)
    assert splits.val.image_path(0).read_bytes() == (root / "val2017/1.jpg").read_bytes()
    assert splits.train.image_path(0).read_bytes() == (root / "train2017/1.jpg").read_bytes()


def test_coco_faults(tmp_path):
    root = coco_set(tmp_path / "src", "train.json", "images", range(4))
    coco_set(root, "train2.json", "images", (1,))
    assert "train.json and train2.json both look like the train split; give one" in fault("coco", root, tmp_path)
    assert "there is no COCO annotation file" in fault("coco", picture(tmp_path / "e" / "a.jpg").parent, tmp_path)
    assert "no such folder or file" in fault("coco", tmp_path / "nowhere", tmp_path)
    coco_set(coco_set(tmp_path / "n", "a.json", "images", (1,)), "b.json", "images", (2,))
    assert "no file is called train, of a.json, b.json; give one instead" in fault("coco", tmp_path / "n", tmp_path)


def test_images_that_are_missing_are_left_out_with_their_objects_and_counted(tmp_path):
    root = coco_set(tmp_path / "src", "train.json", "images", range(5))
    (root / "images" / "2.jpg").unlink()
    found = read_coco(root)
    assert [row["id"] for row in found.parts["train"].images] == [0, 1, 3, 4]
    assert [row["image_id"] for row in found.parts["train"].annotations] == [0, 1, 3, 4]
    assert found.notes == [
        "1 images whose file is not there: left out with their annotations (2.jpg)",
        "1 annotations of images that are left out: left out too (annotation 2)",
    ]


def test_a_file_by_itself_is_the_training_split(tmp_path):
    root = coco_set(tmp_path / "src", "captions_train.json", "images", (1, 2))  # in a folder it would be left out
    found = read_coco(root / "captions_train.json")
    assert list(found.parts) == ["train"]
    assert found.categories == [{"id": 17, "name": "cat"}]
    assert [row["file_name"] for row in found.parts["train"].images] == ["1.jpg", "2.jpg"]
    assert found.parts["train"].files == [root / "images" / f"{i}.jpg" for i in (1, 2)]


def test_files_of_other_tasks_are_left_out(tmp_path):
    root = coco_set(tmp_path / "src", "annotations/instances_train2017.json", "train2017", (1,))
    for name in ("captions_train2017", "person_keypoints_train2017", "stuff_train2017", "image_info_test2017"):
        (root / "annotations" / f"{name}.json").write_text("{}")
    assert len(read_coco(root).parts["train"].images) == 1


def test_one_file_of_any_name_in_a_folder(tmp_path):
    assert len(read_coco(coco_set(tmp_path, "result.json", "images", (1,))).parts["train"].images) == 1


@pytest.mark.parametrize(
    ("images", "problem"),
    [
        (None, "'images' is None; an LVIS or COCO file has a list of image objects there"),
        ({}, "'images' is {}; an LVIS or COCO file has a list of image objects there"),
        ([], "the list of images is empty; fill it, or remove the file"),
    ],
)
def test_a_file_without_images(tmp_path, images, problem):
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"annotations": [], "images": images, "categories": [{"id": 1, "name": "a"}]}))
    with pytest.raises(UserError) as caught:
        read_coco(path)
    assert str(caught.value) == f"{path}: {problem}"


def test_images_that_are_nowhere(tmp_path):
    root = coco_set(tmp_path / "src", "train.json", "images", (1, 2))
    for path in (root / "images").iterdir():
        path.unlink()
    with pytest.raises(
        UserError, match=rf"train\.json: 2 of its 2 images are not in {root}, the first of them 1\.jpg;"
    ):
        read_coco(root)
    content = json.loads((root / "train.json").read_text())
    content["images"][0]["file_name"] = None
    (root / "train.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="have no file_name, the first of them image 1; give each the name of its file"):
        read_coco(root)


def test_rows_keep_what_the_file_says(tmp_path):
    root = coco_set(tmp_path / "src", "train.json", "images", (1,))
    content = json.loads((root / "train.json").read_text())
    content["images"][0] |= {"license": 3, "neg_category_ids": [17]}
    content["annotations"][0]["score"] = 0.5
    (root / "train.json").write_text(json.dumps(content))
    part = read_coco(root).parts["train"]
    assert part.images == content["images"]
    assert part.annotations == content["annotations"]


# ---------------------------------------------------------------------------------------------------------
# Layouts: each as the tool writes it


LAYOUTS = {
    "CVAT, Datumaro": (
        ("annotations/instances_Train.json", "images/Train"),
        ("annotations/instances_Validation.json", "images/Validation"),
    ),
    "CVAT, a subset without a name": (
        ("annotations/instances_default.json", "images/default"),
        ("annotations/instances_Validation.json", "images/Validation"),
    ),
    "FiftyOne": (("train/labels.json", "train/data"), ("validation/labels.json", "validation/data")),
    "Roboflow": (("train/_annotations.coco.json", "train"), ("valid/_annotations.coco.json", "valid")),
    "labelme2coco": (("train.json", "."), ("val.json", ".")),
    "supervision": (("train/annotations.json", "train/images"), ("val/annotations.json", "val/images")),
    "mmdetection's tutorial": (("train/annotation_coco.json", "train"), ("val/annotation_coco.json", "val")),
    "COCO": (
        ("annotations/instances_train2017.json", "train2017"),
        ("annotations/instances_val2017.json", "val2017"),
    ),
    "words": (("foodstuff_train.json", "images"), ("latest_val.json", "images")),
    "LVIS": (("lvis_v1_train.json", "train2017"), ("lvis_v1_val.json", "train2017")),
    "training": (("training/coco.json", "training/images"), ("validation/coco.json", "validation/images")),
}


@pytest.mark.parametrize("tool", LAYOUTS)
def test_layouts_of_tools(tmp_path, tool):
    (train, train_images), (val, val_images) = LAYOUTS[tool]
    root = coco_set(coco_set(tmp_path, train, train_images, (1, 2)), val, val_images, (3,))
    found = read_coco(root)
    assert {split: [row["id"] for row in part.images] for split, part in found.parts.items()} == {
        "train": [1, 2],
        "val": [3],
    }
    for part in found.parts.values():
        assert all(path.name == f"{row['id']}.jpg" for row, path in zip(part.images, part.files, strict=True))
        assert all(path.is_file() for path in part.files)


SINGLE = {
    "CVAT": ("annotations/instances_default.json", "images/default", "{}.jpg"),
    "CVAT without subset folder": ("annotations/instances_default.json", "images", "{}.jpg"),
    "FiftyOne": ("labels.json", "data", "{}.jpg"),
    "Label Studio": ("result.json", "images", "images/{}.jpg"),
    "Label Studio on Windows": ("result.json", "images", "images\\{}.jpg"),
    "Label Studio, paths of its server": ("result.json", "images", "/data/upload/3/{}.jpg"),
    "labelme's script": ("annotations.json", "JPEGImages", "JPEGImages/{}.jpg"),
    "labelme2coco": ("dataset.json", "photos/deep", "C:\\me\\photos\\deep\\{}.jpg"),
    "one file for both": ("annotations/instances_trainval.json", "images", "{}.jpg"),
    "TrainVal": ("annotations/TrainVal.json", "images", "{}.jpg"),
    "a name that holds val": ("carnival.json", "images", "./{}.jpg"),
    "a name that holds both": ("carnival_train.json", "images", "../images/{}.jpg"),
    "the test split of a contest": ("test.json", "images", "{}.JPG"),
}


@pytest.mark.parametrize("tool", SINGLE)
def test_one_file_is_one_set(tmp_path, tool):
    path, images, name = SINGLE[tool]
    root = coco_set(tmp_path / "src", path, images, range(6))
    content = json.loads((root / path).read_text())
    for row in content["images"]:
        row["file_name"] = name.format(row["id"])
    (root / path).write_text(json.dumps(content))
    found = read_coco(root)
    assert list(found.parts) == ["train"]
    assert found.parts["train"].files == [root / images / f"{i}.jpg" for i in range(6)]
    splits, notes = converted("coco", root, tmp_path)
    assert (len(splits.train), len(splits.val)) == (5, 1)
    assert not set(splits.train.image_ids.tolist()) & set(splits.val.image_ids.tolist())
    assert any("no validation split" in note for note in notes)


def test_files_that_are_no_data_are_not_looked_into(tmp_path):
    root = coco_set(tmp_path, "train.json", "images", (1,))
    content = (root / "train.json").read_bytes()
    for name in ("._train.json", ".ipynb_checkpoints/train.json", "__MACOSX/train.json"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)
    (root / "results_train.json").write_text("[]")
    (root / "package.json").write_text('{"name": "x"}')
    assert list(read_coco(root).parts) == ["train"]


def test_annotation_files_that_are_left_out_are_named(tmp_path):
    root = coco_set(coco_set(tmp_path, "train.json", "images", (1,)), "val.json", "images", (2,))
    coco_set(root, "test.json", "images", (3,))
    coco_set(root, "x/test.json", "test", (4,))
    assert read_coco(root).notes == [
        "other annotation files, left out: test.json, x/test.json",
        "1 images that these annotations do not list: left out (images/3.jpg)",
    ]
    assert read_coco(root / "train.json").notes == []


def test_links_to_folders_outside_are_counted(tmp_path):
    root = coco_set(tmp_path / "src", "train.json", "images", (1,))
    picture(tmp_path / "secret" / "2.jpg")
    (root / "images" / "more").symlink_to(tmp_path / "secret")
    assert read_coco(root).notes == ["1 links to folders outside of the source: not followed (images/more)"]


def test_a_picture_in_both_files_is_no_validation_picture(tmp_path):
    root = coco_set(tmp_path / "src", "train.json", "images", (1, 2))
    coco_set(root, "val.json", "images", (2, 3))
    splits, notes = converted("coco", root, tmp_path)
    assert (splits.train.image_ids.tolist(), splits.val.image_ids.tolist()) == ([1, 2], [3])
    assert "1 images are in both splits: left out of validation" in notes


def test_validation_that_is_training_again_is_divided(tmp_path):
    root = coco_set(coco_set(tmp_path / "src", "train.json", "images", range(6)), "val.json", "images", range(6))
    splits, notes = converted("coco", root, tmp_path)
    assert (len(splits.train), len(splits.val)) == (5, 1)
    assert "all validation images are training images too: they count as one set" in notes


def test_a_validation_file_without_images_is_no_split(tmp_path):
    root = coco_set(tmp_path / "src", "train.json", "images", range(6))
    (root / "val.json").write_text(
        json.dumps({"images": [], "annotations": [], "categories": [{"id": 17, "name": "cat"}]})
    )
    splits, notes = converted("coco", root, tmp_path)
    assert (len(splits.train), len(splits.val)) == (5, 1)
    assert "val.json lists no images: left out" in notes


def test_an_image_of_one_split_is_never_that_of_the_same_name_in_the_others_folder(tmp_path):
    """Else the wrong picture would get its objects, and the right one would be left out of validation."""
    root = coco_set(coco_set(tmp_path / "src", "train.json", "train", range(5)), "val.json", "val", range(3))
    (root / "train" / "1.jpg").unlink()
    found = read_coco(root)
    assert [row["id"] for row in found.parts["train"].images] == [0, 2, 3, 4]
    assert found.parts["val"].files == [root / "val" / f"{i}.jpg" for i in range(3)]
    assert found.notes[0] == "1 images whose file is not there: left out with their annotations (1.jpg) in train.json"


def test_images_of_a_file_by_itself_may_lie_in_folders_of_any_split(tmp_path):
    root = coco_set(coco_set(tmp_path, "labels.json", "train", (5, 6)), "labels.json", "val", range(3))
    content = json.loads((root / "labels.json").read_text())
    content["images"] += [{**content["images"][0], "id": i, "file_name": f"{i}.jpg"} for i in (5, 6)]
    (root / "labels.json").write_text(json.dumps(content))
    assert [path.parent.name for path in read_coco(root).parts["train"].files] == ["val"] * 3 + ["train"] * 2


# ---------------------------------------------------------------------------------------------------------
# Categories


def with_categories(root, name, categories, used=None):
    content = json.loads((root / name).read_text())
    content["categories"] = categories
    for row, number in zip(content["annotations"], used or [categories[0]["id"]] * 99, strict=False):
        row["category_id"] = number
    (root / name).write_text(json.dumps(content))


def two_files(tmp_path):
    return coco_set(coco_set(tmp_path, "train.json", "images", (1, 2)), "val.json", "images", (3,))


def classes(found):
    names = {row["id"]: row["name"] for row in found.categories}
    return {split: [names[row["category_id"]] for row in part.annotations] for split, part in found.parts.items()}


def test_a_file_that_lists_fewer_categories_gets_all(tmp_path):
    root = two_files(tmp_path)
    with_categories(root, "train.json", [{"id": 1, "name": "bolt"}, {"id": 2, "name": "nut"}], [1, 2])
    with_categories(root, "val.json", [{"id": 2, "name": "nut"}])
    found = read_coco(root)
    assert found.categories == [{"id": 1, "name": "bolt"}, {"id": 2, "name": "nut"}]
    assert classes(found) == {"train": ["bolt", "nut"], "val": ["nut"]}
    assert found.notes == ["val.json lists 1 of 2 categories: it gets all of them"]


def test_files_that_number_their_categories_each_for_itself_are_matched_by_name(tmp_path):
    """supervision and labelme2coco number what occurs in each split from 0."""
    root = two_files(tmp_path)
    with_categories(root, "train.json", [{"id": 0, "name": "bolt"}, {"id": 1, "name": "nut"}], [0, 1])
    with_categories(root, "val.json", [{"id": 0, "name": "nut"}])
    content = json.loads((root / "val.json").read_text())
    content["images"][0]["neg_category_ids"] = [0]
    (root / "val.json").write_text(json.dumps(content))
    found = read_coco(root)
    assert found.categories == [{"id": 1, "name": "bolt"}, {"id": 2, "name": "nut"}]
    assert classes(found) == {"train": ["bolt", "nut"], "val": ["nut"]}
    assert found.parts["val"].images[0]["neg_category_ids"] == [2]
    assert "matched by name" in found.notes[0]


def test_a_category_that_is_only_a_supercategory_is_left_out(tmp_path):
    root = two_files(tmp_path)
    categories = [
        {"id": 0, "name": "parts", "supercategory": "none"},
        {"id": 1, "name": "bolt", "supercategory": "parts"},
        {"id": 2, "name": "nut", "supercategory": "parts"},
        {"id": 3, "name": "washer", "supercategory": "washer"},
    ]
    for name in ("train.json", "val.json"):
        with_categories(root, name, categories, [1, 2])
    found = read_coco(root)
    assert [row["name"] for row in found.categories] == ["bolt", "nut", "washer"]
    assert "'parts': left out, no object has this category" in found.notes[0]
    with_categories(root, "val.json", categories, [0])
    assert len(read_coco(root).categories) == 4


@pytest.mark.parametrize("first", [1, 7])
def test_a_project_of_the_name_of_its_class_leaves_the_class_its_name(tmp_path, first):
    """Roboflow writes it so; also where the files do not agree on the ids."""
    root = two_files(tmp_path)
    project = {"id": 0, "name": "fish", "supercategory": "none"}
    with_categories(root, "train.json", [project, {"id": 1, "name": "fish", "supercategory": "fish"}], [1, 1])
    with_categories(root, "val.json", [project, {"id": first, "name": "fish", "supercategory": "fish"}], [first])
    found = read_coco(root)
    assert [(row["id"], row["name"]) for row in found.categories] == [(1, "fish")]
    assert classes(found) == {"train": ["fish"] * 2, "val": ["fish"]}
    assert found.notes[0] == (
        "'fish': left out, no object has this category and it is only the supercategory of others"
    )
    assert len(found.notes) == (1 if first == 1 else 2)


def test_a_project_of_the_name_of_its_class_that_has_objects_stays(tmp_path):
    root = two_files(tmp_path)
    rows = [{"id": 0, "name": "fish", "supercategory": "none"}, {"id": 1, "name": "fish", "supercategory": "fish"}]
    with_categories(root, "train.json", rows, [1, 1])
    with_categories(root, "val.json", rows, [0])
    assert [(row["id"], row["name"]) for row in read_coco(root).categories] == [(0, "fish"), (1, "fish (2)")]


def test_names_that_differ_in_their_unicode_form_only_are_one(tmp_path):
    root = two_files(tmp_path)
    whole, pieces = "caf\u00e9", "cafe\u0301"
    with_categories(root, "train.json", [{"id": 1, "name": pieces}, {"id": 1, "name": whole}])
    with_categories(root, "val.json", [{"id": 2, "name": whole}])
    found = read_coco(root)
    assert [row["name"] for row in found.categories] == [whole]
    assert classes(found) == {"train": [whole] * 2, "val": [whole]}


def test_categories_that_contradict_each_other(tmp_path):
    root = two_files(tmp_path)
    with_categories(root, "train.json", [{"id": 1, "name": "bolt"}, {"id": 2, "name": "bolt"}])
    with_categories(root, "val.json", [{"id": 1, "name": "nut"}])
    with pytest.raises(UserError, match=r"train\.json and .*val\.json: ids and names of the categories do not agree"):
        read_coco(root)
    with_categories(root, "val.json", [{"id": 1, "name": "bolt"}, {"id": 2, "name": "bolt"}])
    assert len(read_coco(root).categories) == 2  # told apart by their ids
