import pytest
from foreign_files import coco_set, converted, fault, picture
from PIL import Image


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
