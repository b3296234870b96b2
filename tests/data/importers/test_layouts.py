from pathlib import Path

import pytest

from tailseg.data.importers.layouts import by_split, split_of, split_of_path, words_of


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
    ("path", "split"),
    [
        ("train/a.json", "train"),
        ("labels/val2017/a.json", "val"),
        ("test/train/a.json", "test"),  # the first that tells
        ("x/y/a.json", None),
        ("train.json", None),  # a file's own name tells nothing
    ],
)
def test_folders_of_a_path_tell_its_split(path, split):
    assert split_of_path(Path("train_data", path), Path("train_data")) == split


@pytest.mark.parametrize(
    ("told", "parts", "rest"),
    [
        ({}, {"train": []}, []),
        ({"a": None, "b": None}, {"train": ["a", "b"]}, []),
        ({"a": "val", "b": "train", "c": "train"}, {"train": ["b", "c"], "val": ["a"]}, []),
        ({"a": "val", "b": "train", "c": "test", "d": None}, {"train": ["b"], "val": ["a"]}, ["c", "d"]),
        ({"a": None, "b": "test", "c": "train"}, {"train": ["a", "c"]}, ["b"]),  # train may be a class
        ({"a": "val", "b": None, "c": "test"}, {"train": ["b"], "val": ["a"]}, ["c"]),
        ({"a": "val", "b": "test"}, {"train": ["b"], "val": ["a"]}, []),
        ({"a": "test", "b": None}, {"train": ["a", "b"]}, []),  # so may be a word such as test
        ({"a": "val", "b": "val"}, {"train": ["a", "b"]}, []),
        ({"a": "test"}, {"train": ["a"]}, []),
    ],
)
def test_items_by_their_splits(told, parts, rest):
    assert by_split(told.items()) == (parts, rest)
