import pytest
from foreign_files import write_files

from tailseg.data.importers.yolo_config import YoloConfig, find_config, find_names, names_in
from tailseg.errors import UserError


def config(tmp_path, text: str) -> YoloConfig:
    found = find_config(write_files(tmp_path, {"data.yaml": text}))
    assert found is not None
    return found


# ---------------------------------------------------------------------------------------------------------
# Class names


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("names: [cat, owl]", {0: "cat", 1: "owl"}),
        ("names:\n- cat\n- owl\n", {0: "cat", 1: "owl"}),
        ("names: {0: cat, 1: owl}", {0: "cat", 1: "owl"}),
        ("names: {'1': owl, '0': cat}", {0: "cat", 1: "owl"}),
        ("names: {1: cat, 2: owl}", {1: "cat", 2: "owl"}),  # counted from 1
        ("names: {0: cat, 7: owl}", {0: "cat", 7: "owl"}),
        ("names: [1, 2.50, 007]", {0: "1", 1: "2.50", 2: "007"}),
        ("names: [yes, no, null, 2020-13-45]", {0: "yes", 1: "no", 2: "null", 3: "2020-13-45"}),
        ("names: ['traffic light', \"stop: sign\", Käfer]", {0: "traffic light", 1: "stop: sign", 2: "Käfer"}),
        ("names: [cafe\u0301]", {0: "caf\u00e9"}),
        ("nc: 2", {0: "class_0", 1: "class_1"}),
        ("nc: 3\nnames: [cat]", {0: "cat"}),
        ("a: 1", None),
    ],
)
def test_names(tmp_path, text, names):
    assert config(tmp_path, text).names() == names


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("names: []", "'names' must be a list of class names, or map 0, 1, 2, ... to them"),
        ("names: {}", "'names' must be a list"),
        ("names: cat", "'names' must be a list"),
        ("names: [cat, '']", "'names' must be a list"),
        ("names: [cat, [owl]]", "'names' must be a list"),
        ("names: {cat: 0}", "'names' must be a list"),
        ("names: {-1: cat}", "'names' must be a list"),
        ("names: {? [0] : cat}", "not valid YAML"),
        ("names: [cat, owl, cat]", "the class name 'cat' occurs more than once; give each class its own"),
        ("names: {3: cat, 9: cat}", "the class name 'cat' occurs more than once"),
        ("nc: many", "nc is 'many'; it must be the number of classes"),
        ("nc: 0", "nc is '0'; it must be the number"),
        ("nc: " + "9" * 5000, "it must be the number"),
    ],
)
def test_names_at_fault(tmp_path, text, sentence):
    with pytest.raises(UserError) as caught:
        config(tmp_path, text).names()
    assert str(caught.value).startswith(f"{tmp_path / 'data.yaml'}: ")
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "names"),
    [
        ("classes.txt", "cat\r\n owl \n\n", {0: "cat", 1: "owl"}),
        ("obj.names", "\ufeffcat\n\nowl", {0: "cat", 2: "owl"}),  # nobody has number 1
        ("notes.json", '{"categories": [{"id": 1, "name": "owl"}, {"id": 0, "name": "cat"}]}', {0: "cat", 1: "owl"}),
    ],
)
def test_files_of_names(tmp_path, name, text, names):
    assert names_in(write_files(tmp_path, {name: text}) / name) == names


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("classes.txt", "\n", "it lists no class names; write one a line"),
        ("classes.txt", "cat\ncat", "the class name 'cat' occurs more than once"),
        ("notes.json", '{"categories": 3}', "it lists no class names"),
        ("notes.json", '{"categories": [3, {"id": "a", "name": "cat"}]}', "it lists no class names"),
    ],
)
def test_files_of_names_at_fault(tmp_path, name, text, sentence):
    with pytest.raises(UserError, match=rf"{name}: {sentence}"):
        names_in(write_files(tmp_path, {name: text}) / name)


def test_the_file_of_names_nearest_to_the_root_counts(tmp_path):
    assert find_names(tmp_path) is None
    write_files(tmp_path, {"a/labels/classes.txt": "dog", "a/labels/x.txt": "0 1"})
    assert find_names(tmp_path) == (tmp_path / "a/labels/classes.txt", {0: "dog"})
    write_files(tmp_path, {"train/_darknet.labels": "cat\nowl", "valid/_darknet.labels": "cat\nowl\n"})
    assert find_names(tmp_path) == (tmp_path / "train/_darknet.labels", {0: "cat", 1: "owl"})
    write_files(tmp_path, {"valid/_darknet.labels": "owl\ncat"})
    with pytest.raises(UserError, match=r"valid/_darknet\.labels: its class names are not those of .*/train/_darknet"):
        find_names(tmp_path)
    write_files(tmp_path, {"Classes.txt": "bee", ".hidden/classes.txt": "x"})
    assert find_names(tmp_path) == (tmp_path / "Classes.txt", {0: "bee"})


# ---------------------------------------------------------------------------------------------------------
# Entries


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("train: a\nval: b", {"train": ["a"], "val": ["b"]}),
        ("train: a\nvalid: b", {"train": ["a"], "val": ["b"]}),
        ("train: a\nvalidation: b", {"train": ["a"], "val": ["b"]}),
        ("Train: a\nVALID: b\nTest: c", {"train": ["a"], "val": ["b"], "test": ["c"]}),
        ("train: [a, b]\nval: [c]", {"train": ["a", "b"], "val": ["c"]}),
        ("train: a\nval: b\nvalid: c", {"train": ["a"], "val": ["b", "c"]}),
        ("train: a\nval:\ntest: ''\n", {"train": ["a"]}),
        ("train: a\nval: null\ntest: []\n", {"train": ["a"]}),
        ("train: 2017", {"train": ["2017"]}),
        ("carnival: a\ntrain_size: 640\nval_period: 1\neval: coco\nnc: 1", {}),
    ],
)
def test_entries_of_splits(tmp_path, text, entries):
    assert config(tmp_path, text).entries() == entries


@pytest.mark.parametrize("value", ["{a: 1}", "[[a]]"])
def test_entries_at_fault(tmp_path, value):
    with pytest.raises(UserError, match=r"data\.yaml: train is .*; it must be a folder of images or a list of files"):
        config(tmp_path, f"train: {value}").entries()


@pytest.mark.parametrize(
    ("text", "base", "numbers"),
    [
        ("path: ../sets/x\nkpt_shape: [17, 3]", "../sets/x", 51),
        ("path:\nkpt_shape: [4, 2]", None, 8),
        ("path: [a]\nkpt_shape: 17", None, 0),
        ("kpt_shape: [-1, 3]", None, 0),
        ("a: 1", None, 0),
    ],
)
def test_path_and_keypoints(tmp_path, text, base, numbers):
    found = config(tmp_path, text)
    assert (found.base, found.keypoint_numbers) == (base, numbers)


# ---------------------------------------------------------------------------------------------------------
# The file


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"data.yaml": "names: [a]"}, "data.yaml"),
        ({"data.yaml": "a: 1", "other.yaml": "names: [a]"}, "data.yaml"),
        ({"Data.YML": "names: [a]", "hyp.yaml": "lr: 1"}, "Data.YML"),
        ({"mine.yml": "names: [a]"}, "mine.yml"),
        ({"mine.yml": "names: [a]", "hyp.yaml": "lr: 1", "broken.yaml": "["}, "mine.yml"),
        ({"hyp.yaml": "lr: 1"}, None),
        ({"compose.yaml": "train: {a: b}"}, None),
        ({"._data.yaml": "\0", ".x.yaml": "names: [a]"}, None),
        ({"set/data.yaml": "names: [a]"}, "set/data.yaml"),
        ({"set/coco8.yaml": "names: [a]", "set/images/a.jpg": b""}, "set/coco8.yaml"),
        ({"set/set/data.yaml": "names: [a]", ".DS_Store": b""}, "set/set/data.yaml"),
        ({"a/b/c/d/e/data.yaml": "names: [a]"}, "a/b/c/d/e/data.yaml"),
        ({"a/b/c/d/e/f/data.yaml": "names: [a]"}, None),
        ({"set/set/data.yaml": "names: [a]", "a.jpg": b""}, None),
        ({"set/set/data.yaml": "names: [a]", "other/a.jpg": b""}, None),
        ({"configs/coco8.yaml": "names: [a]", "images/a.jpg": b""}, None),
        ({"obj.data": "classes = 1\ntrain = data/train.txt\nnames = obj.names", "obj.names": "a"}, "obj.data"),
        ({"x.data": b"\xff\xfe"}, None),
        ({}, None),
    ],
)
def test_the_file_that_describes_a_folder(tmp_path, files, found):
    config = find_config(write_files(tmp_path, files))
    assert (config and config.path) == (tmp_path / found if found else None)


def test_darknets_file(tmp_path):
    text = "classes = 2\ntrain  = data/train.txt\nvalid=data/valid.txt\nnames = data/obj.names\nbackup = backup/\n"
    config = find_config(write_files(tmp_path, {"obj.data": text}) / "obj.data")
    assert config.entries() == {"train": ["data/train.txt"], "val": ["data/valid.txt"]}
    assert config.content["names"] == "data/obj.names"


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"a.yaml": "names: [a]", "b.yml": "names: [a]"}, "{}: both a.yaml and b.yml describe a data set; name the"),
        (
            {"one/data.yaml": "names: [a]", "two/mine.yaml": "names: [b]", "two/labels/a.txt": ""},
            "{}: both one/data.yaml and two/mine.yaml describe a data set; name the file to use",
        ),
        ({"mine.yml": "names: ["}, "{}/mine.yml: not valid YAML at line 1; write the entries train, val and names"),
        ({"data.yaml": "- a"}, "{}/data.yaml: expected the entries train, val and names; check the file"),
        ({"data.yaml": "a: &x b\nc: *x"}, "{}/data.yaml: line 2 has the alias *x"),
        ({"data.yaml": b"names: [\xff]"}, "{}/data.yaml: it is not a UTF-8 text; save it as one"),
        ({"data.yaml": "#" * 1_000_001}, "{}/data.yaml: it is larger than 1,000 kB"),
    ],
    ids=range(7),
)
def test_files_at_fault(tmp_path, files, sentence):
    with pytest.raises(UserError) as caught:
        find_config(write_files(tmp_path, files))
    assert str(caught.value).startswith(sentence.format(tmp_path))


def test_a_file_of_another_kind(tmp_path):
    path = write_files(tmp_path, {"classes.txt": "cat"}) / "classes.txt"
    with pytest.raises(UserError) as caught:
        find_config(path)
    assert str(caught.value) == f"{path}: expected a data.yaml or obj.data; give that file or the folder of the set"


def test_a_folder_that_cannot_be_listed(tmp_path):
    with pytest.raises(UserError, match=r"gone: cannot be listed \(.*\); check the path and its rights"):
        find_config(tmp_path / "gone")
