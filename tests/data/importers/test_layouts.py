from pathlib import Path

import pytest
from foreign_files import calls

from tailseg.data.importers.layouts import ImageFinder, by_split, split_of, split_of_path, words_of


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


@pytest.mark.parametrize(
    ("copies", "place"),
    [
        (["images", "thumbs"], "images"),  # though the thumbs are complete
        (["deep/images", "deep/backup/images"], "deep/images"),
        (["a/more", "b"], "b"),
    ],
)
def test_of_copies_of_all_images_those_in_the_usual_place_are_meant(tmp_path, copies, place):
    for copy in copies:
        for name in ("a.jpg", "b.jpg", *(["c.jpg"] if copy == "thumbs" else [])):  # which has more of the images
            (tmp_path / copy).mkdir(parents=True, exist_ok=True)
            (tmp_path / copy / name).touch()
    found = ImageFinder(tmp_path).locate([["a.jpg"], ["b.jpg"], ["c.jpg"], ["d.jpg"]], tmp_path, "train")
    other = tmp_path / "thumbs" / "c.jpg"
    assert found == [tmp_path / place / "a.jpg", tmp_path / place / "b.jpg", other if other.exists() else None, None]


def test_of_files_that_differ_by_the_case_of_their_suffix_only_the_very_name_is_meant(tmp_path):
    for name in ("deep/a.JPG", "deep/a.jpg", "deep/b.JPG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = ImageFinder(tmp_path).locate([["a.jpg"], ["a.JPG"], ["a.Jpg"], ["b.jpg"]], tmp_path, "train")
    assert [path and path.name for path in found] == ["a.jpg", "a.JPG", None, "b.JPG"]


@pytest.mark.parametrize(("alone", "place"), [(True, "train/b.jpg"), (False, None)])
def test_an_image_of_another_split_is_meant_only_where_there_is_no_other_file(tmp_path, alone, place):
    for name in ("train/a.jpg", "train/b.jpg", "val/a.jpg", "more/c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = ImageFinder(tmp_path).locate([["a.jpg"], ["b.jpg"], ["c.jpg"]], tmp_path, "val", alone=alone)
    expected = ["val/a.jpg", place, "more/c.jpg"]
    assert [path and str(path.relative_to(tmp_path)) for path in found] == expected
    stated = ImageFinder(tmp_path).locate(
        [["a.jpg"], ["b.jpg", "train/b.jpg"], ["x.jpg"]], tmp_path, "val", alone=alone
    )
    assert stated == [tmp_path / "val/a.jpg", tmp_path / "train/b.jpg", None]  # LVIS names the folder


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name, encoding="utf-8")


def test_of_files_that_are_as_good_as_each_other_those_that_fit_count(tmp_path):
    names = ("cam1/a.jpg", "cam1/b.jpg", "cam2/a.jpg", "cam2/b.jpg")
    touch(tmp_path, *names)
    finder = ImageFinder(tmp_path)
    assert finder.locate([["a.jpg"], ["b.jpg"]], tmp_path, "train") == [None, None]
    assert finder.rivals == {
        i: [tmp_path / "cam1" / name, tmp_path / "cam2" / name] for i, name in enumerate(["a.jpg", "b.jpg"])
    }
    fitting = {0: "cam2", 1: "cam1"}
    found = finder.locate(
        [["a.jpg"], ["a.jpg"], ["b.jpg"]],
        tmp_path,
        "train",
        fits=lambda place, path: path.parent.name == fitting.get(place),
    )
    assert found == [tmp_path / "cam2/a.jpg", tmp_path / "cam1/a.jpg", None]
    assert sorted(finder.rivals) == [0, 1, 2]
    assert finder.locate([["cam2/a.jpg"]], tmp_path, "train") == [tmp_path / "cam2/a.jpg"]
    assert finder.rivals == {}


def test_a_name_without_suffix_stands_for_any(tmp_path):
    touch(tmp_path, "images/a.jpg", "images/b.jpg", "images/b.png", "images/x.y.jpg", "images/x.y")
    finder = ImageFinder(tmp_path)
    found = finder.locate([["a"], ["old/a"], ["b"], ["x.y"], ["b.jpg"], ["c"], [""]], tmp_path, "train")
    images = tmp_path / "images"
    assert found == [images / "a.jpg", images / "a.jpg", None, images / "x.y.jpg", images / "b.jpg", None, None]
    assert finder.rivals == {2: [images / "b.jpg", images / "b.png"]}


def test_links_to_one_file_are_one_file(tmp_path):
    touch(tmp_path, "x/a.jpg")
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "a.jpg").symlink_to(tmp_path / "x" / "a.jpg")
    assert ImageFinder(tmp_path).locate([["a.jpg"], ["b.jpg"]], tmp_path, "train") == [tmp_path / "x/a.jpg", None]


def test_copies_of_one_image_are_as_good_as_it(tmp_path):
    for name in ("x/a.jpg", "y/a.jpg", "x/b.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name[2:], encoding="utf-8")
    assert ImageFinder(tmp_path).locate([["a.jpg"], ["b.jpg"]], tmp_path, "train") in (
        [tmp_path / "x/a.jpg", tmp_path / "x/b.jpg"],
        [tmp_path / "y/a.jpg", tmp_path / "x/b.jpg"],
    )


def test_files_of_one_name_are_found_by_their_folders(tmp_path):
    touch(tmp_path, *(f"scenes/s{i}/rgb.png" for i in range(50)))
    names = [[f"/old/s{i}/rgb.png"] for i in range(50)]
    found = ImageFinder(tmp_path).locate([*names, ["/old/s50/rgb.png"]], tmp_path, "train")
    assert found == [*(tmp_path / f"scenes/s{i}/rgb.png" for i in range(50)), None]


@pytest.mark.parametrize("name", ["/old/s{}/rgb.png", "/gone/{}/rgb.png"])
def test_the_work_for_files_of_one_name_grows_as_their_number(tmp_path, name):
    def search(number):
        root = tmp_path / str(number)
        touch(root, *(f"scenes/s{i}/rgb.png" for i in range(number)))
        names = [[name.format(i)] for i in range(number)]
        return calls(lambda: ImageFinder(root).locate([*names, ["none.png"]], root, "train"))

    search(10)  # imports and the like
    assert search(200) < 2.5 * search(100)
