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
    (root / "images" / "2.jpg").unlink()
    assert "'2.jpg' is not in" in fault("coco", root, tmp_path)
    coco_set(root, "train2.json", "images", (1,))
    assert "train.json and train2.json both look like the train split" in fault("coco", root, tmp_path)
    assert "no annotation file with 'train'" in fault("coco", picture(tmp_path / "e" / "a.jpg").parent, tmp_path)
    assert "no such folder or file" in fault("coco", tmp_path / "nowhere", tmp_path)
    two = coco_set(coco_set(tmp_path / "two", "train.json", "images", (1,)), "val.json", "images", (2,), name="owl")
    assert "both files need the same categories" in fault("coco", two, tmp_path)


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


@pytest.mark.parametrize("images", [None, [], {}, [3]])
def test_a_file_without_images(tmp_path, images):
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"images": images, "annotations": [], "categories": []}))
    with pytest.raises(UserError, match=f"^{path}: 'images' must be a list of at least one image; check the file"):
        read_coco(tmp_path)


def test_images_that_are_nowhere(tmp_path):
    root = coco_set(tmp_path / "src", "train.json", "elsewhere", (1,))
    with pytest.raises(
        UserError, match=rf"train\.json: its first image, 1\.jpg, is not in {root} or its images folder"
    ):
        read_coco(root)
    content = json.loads((root / "train.json").read_text())
    content["images"][0]["file_name"] = None
    (root / "train.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="its first image, without a name, is not in"):
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
