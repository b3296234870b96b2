import pytest

from tailseg.data.importers.layouts import split_folders, split_of, words_of


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("instances_Val2017.json", ["instances", "val", "json"]),
        ("TrainVal", ["train", "val"]),
        ("foodstuff_train", ["foodstuff", "train"]),
        ("COCOval", ["coc", "oval"]),  # no more than a person sees at once
        ("VALID", ["valid"]),
        ("2017", []),
    ],
)
def test_words_of_a_name(name, words):
    assert words_of(name) == words


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *[(name, "train") for name in ("train", "Train", "TRAIN", "train2017", "training", "foodstuff_train")],
        *[(name, "val") for name in ("val", "Valid", "validation", "val2017", "latest_val", "instances_minival2014")],
        *[(name, "test") for name in ("test", "test2017", "image_info_test-dev2017")],
        *[(name, None) for name in ("carnival", "interval", "latest", "strain", "trainval", "TrainVal", "train_val")],
        ("carnival_train", "train"),
        ("", None),
    ],
)
def test_splits_are_told_by_words(name, split):
    assert split_of(name) == split


@pytest.mark.parametrize(
    ("folders", "found"),
    [
        ((), {"train": ""}),
        (("train", "val"), {"train": "train", "val": "val"}),
        (("Training", "validation"), {"train": "Training", "val": "validation"}),
        (("train2017", "val2017"), {"train": "train2017", "val": "val2017"}),
        (("train", "test"), {"train": "train"}),
        (("val",), {"train": ""}),  # a set without training folder is one whole
        (("carnival", "strain"), {"train": ""}),
    ],
)
def test_folders_of_splits(tmp_path, folders, found):
    for name in folders:
        (tmp_path / name).mkdir()
    assert split_folders(tmp_path) == {split: tmp_path / name for split, name in found.items()}


def test_a_file_called_train_is_no_folder(tmp_path):
    (tmp_path / "train").touch()
    assert split_folders(tmp_path) == {"train": tmp_path}
