"""From what stands behind --data to a data set, and which of a model's classes it has, by name."""

import json
import logging
import pickle
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
from annotation_files import annotation, content
from foreign_files import coco_set, picture
from supervisely_files import box, supervisely

from tailseg.data.annotations.annotations import Annotations, Category
from tailseg.data.annotations.frequency import GroupRule
from tailseg.data.sources import known_categories, open_data, open_splits, same_name, splits_there
from tailseg.data.synthetic.generate import SyntheticSettings, write_synthetic
from tailseg.errors import UserError


def annotations_of(folder: Path, names: list[str], first_id: int = 10) -> Annotations:
    """A validation file with these categories, their ids three apart, out of order."""
    write_synthetic(folder, SyntheticSettings(classes=4, train_images=1, val_images=2, size=64))
    written = orjson.loads((folder / "val.json").read_bytes())
    written["categories"] = [
        {"id": first_id + 3 * i, "name": name, "frequency": "f"} for i, name in reversed(list(enumerate(names)))
    ]
    written["annotations"] = [row | {"category_id": first_id} for row in written["annotations"]]
    (folder / "val.json").write_bytes(orjson.dumps(written))
    val = open_data(str(folder), need=("val",)).val
    assert val is not None
    return val


def model_of(*names: str) -> list[Category]:
    return [Category(100 + i, name, "f", 1, 1) for i, name in enumerate(names)]


@pytest.fixture
def annotations(tmp_path: Path) -> Annotations:
    return annotations_of(tmp_path / "data", ["zebra", "stop sign", "Hot_Dog", "cup"])


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("cup", "cup"),
        ("Cup", "cup"),
        ("stop_sign", "stop sign"),
        ("  Stop__sign ", "stop sign"),
        ("STOP SIGN", "stop sign"),
        ("cup_(drink)", "cup (drink)"),
        ("", ""),
        ("Cafe\u0301", "caf\u00e9"),
    ],
)
def test_spelling(name: str, plain: str) -> None:
    assert same_name(name) == plain


def test_other_words_stay_other_names() -> None:
    assert len({same_name(name) for name in ("stop sign", "stopsign", "stop-sign", "stop signs")}) == 4


def test_ids_follow_the_models_labels(annotations: Annotations, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert known_categories(annotations, annotations.categories, "m") == [10, 13, 16, 19]
        assert known_categories(annotations, model_of("cup", "Stop_Sign", "hot dog", "ZEBRA"), "m") == [19, 13, 16, 10]
    assert caplog.text == ""  # the data's categories are all known


def test_a_model_that_knows_more(annotations: Annotations, caplog: pytest.LogCaptureFixture) -> None:
    known = model_of("apple", "zebra", "cup", "hot dog", "tie", "stop sign")
    with caplog.at_level(logging.WARNING):
        assert known_categories(annotations, known, "m") == [None, 10, 19, 16, None, 13]
    assert caplog.text == ""


def test_a_model_that_knows_less(annotations: Annotations, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert known_categories(annotations, model_of("cup", "Zebra"), "runs/m.safetensors") == [19, 10]
    (record,) = caplog.records
    assert record.getMessage() == (
        f"runs/m.safetensors knows 2 of the 4 categories of {annotations.path}; "
        "the others, such as 'stop sign', score 0."
    )


@pytest.mark.parametrize("names", [("apple", "tie"), ("tie", "cup", "Zebra"), ("zebra", "stop sign", "hot dog", "mug")])
def test_each_has_what_the_other_lacks(annotations: Annotations, names: tuple[str, ...]) -> None:
    """Then something was renamed, and a score would not be one of the model."""
    with pytest.raises(UserError) as caught:
        known_categories(annotations, model_of(*names), "runs/m.safetensors")
    theirs = next(name for name in names if same_name(name) not in ("zebra", "stop sign", "hot dog", "cup"))
    ours = next(c.name for c in annotations.categories if same_name(c.name) not in map(same_name, names))
    assert str(caught.value).startswith(f"{annotations.path}: has a category '{ours}', which runs/m.safetensors does ")
    assert f"lacks its '{theirs}'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_very_name_comes_before_another_spelling(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of categories that differ in their spelling alone each keeps its own."""
    data = annotations_of(tmp_path / "data", ["Cup", "cup", "CUP"])
    with caplog.at_level(logging.WARNING):
        assert known_categories(data, model_of("cup", "CUP", "Cup"), "m") == [13, 16, 10]
        assert known_categories(data, data.categories, "m") == [10, 13, 16]
    assert caplog.text == ""


def test_ids_of_the_model_do_not_matter(annotations: Annotations) -> None:
    swapped = [replace(category, id=29 - category.id) for category in annotations.categories]
    assert known_categories(annotations, swapped, "m") == [10, 13, 16, 19]


def make_splits(folder, val=None):
    (folder / "images").mkdir()
    (folder / "train.json").write_text(json.dumps(content()))
    (folder / "val.json").write_text(json.dumps(val or content([])))


def test_open_data_from_a_folder_and_from_yaml(tmp_path):
    make_splits(tmp_path)
    splits = open_splits(tmp_path, rule=GroupRule(rare_max=0))
    assert splits.name == tmp_path.name
    assert [c.frequency for c in splits.val.categories] == ["c", "r", "c"]  # those of the training images
    (tmp_path / "pets.yaml").write_text("train: train.json\nval: val.json\nimages: images\n")
    again = open_splits(str(tmp_path / "pets.yaml"), need=("val",), rule=GroupRule(rare_max=0))
    assert again.name == "pets"
    assert again.val.path == tmp_path / "val.json"
    assert again.val.categories == splits.val.categories
    assert again.groups == splits.groups
    assert splits.groups.startswith("Groups: rare up to 0 training images, common up to 100: 1 rare, 2 common, 0 ")
    (tmp_path / "val.json").unlink()
    assert open_splits(tmp_path, need=("train",)).val is None


def test_relative_paths_stay_those_of_one_set(tmp_path, monkeypatch):
    folder, val = tmp_path / "pets", content([])
    folder.mkdir()
    val["images"][0]["file_name"] = "images/of_val.jpg"  # relative to the file
    make_splits(folder, val)
    (folder / "images" / "of_val.jpg").touch()
    monkeypatch.chdir(tmp_path)
    splits = open_splits("pets")
    monkeypatch.chdir(folder)
    assert splits.val.path == Path("pets/val.json")  # as it was given
    assert splits.val.image_path(0) == folder / "images" / "of_val.jpg"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trian: a.json", "unknown entry 'trian'; did you mean 'train'"),
        ("train: 3", "train is 3; it must be a path"),
        ("- a", "expected the entries"),
        ("a: [", "not valid YAML at line"),
        ("train: 2020-13-45", "not valid YAML; write the entries train, val and images"),
        ("train: train.json\nval: val.json", "the entry 'images' is missing"),
        ("train: train.json\nval: gone.json\nimages: images", r"gone\.json does not exist"),
        ("train: train.json\nval: val.json\nimages: val.json", r"val\.json is not a folder"),
    ],
)
def test_bad_yaml(tmp_path, text, expected):
    make_splits(tmp_path)
    (tmp_path / "d.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"d\.yaml: .*{expected}"):
        open_splits(tmp_path / "d.yaml")


@pytest.mark.parametrize("key", ["train", "val", "images"])
def test_a_path_of_hundreds_of_letters(tmp_path, key):
    path = tmp_path / "set.yaml"
    path.write_text("\n".join(f"{k}: {'x' * 300 if k == key else '.'}" for k in ("train", "val", "images")))
    with pytest.raises(UserError, match=rf"^{path}: {tmp_path}/x+ does not exist; it should be"):
        open_splits(path)
    with pytest.raises(UserError, match="no such folder or file"):
        open_splits("x" * 300)


def test_missing_pieces_of_a_folder(tmp_path):
    make_splits(tmp_path)
    (tmp_path / "train.json").unlink()
    (tmp_path / "val.json").unlink()
    with pytest.raises(UserError, match=r": there is no data set in it; give a folder with train\.json"):
        open_splits(tmp_path)
    with pytest.raises(UserError, match="no such folder or file"):
        open_splits(tmp_path / "nowhere")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"notes\.txt: there is no data set in it; give .*, a YAML file with"):
        open_splits(tmp_path / "notes.txt")


def test_splits_need_the_same_categories(tmp_path):
    val = content([])
    val["categories"][1]["name"] = "lynx"
    make_splits(tmp_path, val)
    with pytest.raises(UserError, match=r"category 2 is 'cat' in .*train\.json but 'lynx' in .*val\.json"):
        open_splits(tmp_path)


def test_the_splits_that_are_there(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    with pytest.raises(UserError, match=r"data: there is no data set in it"):
        splits_there(str(folder))
    for name, splits in (("val", ("val",)), ("train", ("train", "val"))):
        (folder / f"{name}.json").touch()
        assert splits_there(str(folder)) == splits
    (tmp_path / "one.yaml").write_text("train: data/train.json\nimages: data")
    assert splits_there(str(tmp_path / "one.yaml")) == ("train",)
    assert splits_there("synthetic") == ("train", "val")
    (tmp_path / "other.json").write_text(json.dumps(content()))
    assert splits_there(str(tmp_path / "other.json")) == ("train", "val")  # as COCO's, which are divided
    with pytest.raises(UserError, match="no such folder or file"):
        splits_there(str(tmp_path / "gone"))


@pytest.mark.parametrize("split", ["train", "val"])
def test_images_are_looked_at_before_they_are_needed(tmp_path, monkeypatch, split):
    """All of validation, whose faults would show at the first evaluation; of training a sample."""
    folder = write_synthetic(tmp_path / "set", SyntheticSettings(classes=4, train_images=6, val_images=6, size=64))
    path = sorted((folder / "images").glob(f"{split}*"))[4]
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=rf"{path}: the image is broken or cut off"):
        open_data(str(folder))
    assert open_data(str(folder), need=("train" if split == "val" else "val",)) is not None
    assert open_data(str(folder), examine=True).val is not None
    monkeypatch.setattr("tailseg.data.sources.TRAIN_SAMPLE", 0)
    if split == "train":
        open_data(str(folder))
    else:
        with pytest.raises(UserError, match="broken or cut off"):
            open_data(str(folder))


# ---------------------------------------------------------------------------------------------------------
# Sets of other tools


def yolo_set(root):
    (root / "labels").mkdir(parents=True)
    (root / "data.yaml").write_text("train: images\nnames: [cat]\n")
    for number in range(6):
        picture(root / "images" / f"{number}.jpg")
        (root / "labels" / f"{number}.txt").write_text("0 0.25 0.25 0.75 0.25 0.25 0.75\n")
    return root


def labelme_set(root):
    for number in range(6):
        picture(root / f"{number}.jpg")
        shape = {"label": "cat", "points": [[20, 10], [60, 10], [20, 30]], "shape_type": "polygon"}
        (root / f"{number}.json").write_text(json.dumps({"shapes": [shape], "imagePath": f"{number}.jpg"}))
    return root


def voc_set(root):
    (root / "Annotations").mkdir(parents=True)
    for number in range(6):
        picture(root / "JPEGImages" / f"{number}.jpg")
        box = "<xmin>21</xmin><ymin>11</ymin><xmax>60</xmax><ymax>30</ymax>"
        text = f"<filename>{number}.jpg</filename><object><name>cat</name><bndbox>{box}</bndbox></object>"
        (root / "Annotations" / f"{number}.xml").write_text(f"<annotation>{text}</annotation>")
    return root


def cvat_set(root):
    images = ""
    for number in range(6):
        picture(root / "images" / f"{number}.jpg")
        polygon = '<polygon label="cat" points="20,10;60,10;20,30" occluded="0"/>'
        images += f'<image id="{number}" name="{number}.jpg" width="80" height="40">{polygon}</image>'
    (root / "annotations.xml").write_text(f"<annotations><version>1.1</version>{images}</annotations>")
    return root


def labelstudio_set(root):
    tasks = []
    for number in range(6):
        picture(root / f"{number}.jpg")
        value = {"points": [[25, 25], [75, 25], [25, 75]], "polygonlabels": ["cat"]}
        annotation = {"completed_by": 1, "result": [{"value": value, "type": "polygonlabels"}]}
        tasks.append({"id": number, "annotations": [annotation], "data": {"image": f"/data/upload/{number}.jpg"}})
    (root / "project.json").write_text(json.dumps(tasks))
    return root


def via_set(root):
    rows = {}
    for number in range(6):
        picture(root / f"{number}.jpg")
        shape = {"name": "polygon", "all_points_x": [20, 60, 20], "all_points_y": [10, 10, 30]}
        region = {"shape_attributes": shape, "region_attributes": {"class": "cat"}}
        rows[f"{number}.jpg34"] = {"filename": f"{number}.jpg", "size": 34, "regions": [region], "file_attributes": {}}
    (root / "via_region_data.json").write_text(json.dumps(rows))
    return root


def supervisely_set(root):
    for number in range(6):
        supervisely(root, f"ds/{number}.jpg", [box((20, 10), (59, 29))])
    return root


SETS = {
    "COCO": lambda root: coco_set(root, "result.json", "images", range(6)),
    "YOLO": yolo_set,
    "labelme": labelme_set,
    "Pascal VOC": voc_set,
    "CVAT for images": cvat_set,
    "Label Studio": labelstudio_set,
    "Supervisely": supervisely_set,
    "VIA (VGG Image Annotator)": via_set,
}
FILES = {
    "COCO": "result.json",
    "YOLO": "data.yaml",
    "CVAT for images": "annotations.xml",
    "Label Studio": "project.json",
    "VIA (VGG Image Annotator)": "via_region_data.json",
}


@pytest.mark.parametrize("tool", SETS)
def test_sets_of_other_tools_open_directly(tmp_path, monkeypatch, caplog, tool):
    monkeypatch.setenv("TAILSEG_CACHE", str(tmp_path / "cache"))
    source = SETS[tool](tmp_path / "src")
    before = {path: path.stat().st_mtime_ns for path in source.rglob("*")}
    with caplog.at_level(logging.INFO):
        splits = open_data(str(source), show=False)
    assert (
        f"{source}: recognised as {tool}: 5 training images with 5 objects, 1 validation images with 1." in caplog.text
    )
    assert "the source has no validation split" in caplog.text
    assert (splits.name, len(splits.train), len(splits.val)) == ("src", 5, 1)
    assert [category.name for category in splits.train.categories] == ["cat"]
    assert splits.train.boxes.tolist() == [[20, 10, 60, 30]] * 5
    assert all(splits.train.image_path(i).is_relative_to(source) for i in range(5))
    assert {path: path.stat().st_mtime_ns for path in source.rglob("*")} == before
    if tool in FILES:
        again = open_data(str(source / FILES[tool]), show=False)
        assert again.train.image_path(0) == splits.train.image_path(0)


def test_a_folder_of_anything_else_is_answered_with_what_is_wanted(tmp_path):
    picture(tmp_path / "a.jpg")
    (tmp_path / "package.json").write_text("{}")
    with pytest.raises(UserError, match=r": there is no data set in it; give a folder with train\.json"):
        open_splits(tmp_path)


def test_who_downloaded_validation_alone_can_evaluate(tmp_path, caplog):
    """COCO val2017 and its annotations are a public test of a converted model; they are not divided."""
    caplog.set_level(logging.INFO)
    val = "annotations/instances_val2017.json"
    root = coco_set(tmp_path, val, "val2017", range(6))
    splits = open_data(str(root), need=("val",), show=False)
    assert (splits.train, len(splits.val)) == (None, 6)
    assert f"{root}: recognised as COCO or LVIS as downloaded: {root / val}." in caplog.messages
    assert splits_there(str(root)) == ("val",)
    with pytest.raises(UserError) as caught:
        open_data(str(root), show=False)
    divide = f"`tailseg data split {root / val} OUT`"
    assert str(caught.value).endswith(f"{root / val}, is of the validation split; divide it with {divide}")
    coco_set(root, "annotations/instances_train2017.json", "train2017", (7,))
    assert splits_there(str(root)) == ("train", "val")
    (root / "train2017/7.jpg").unlink()
    (root / "train2017").rmdir()
    assert len(open_data(str(root), need=("val",), show=False).val) == 6
    with pytest.raises(UserError, match=r"image 7: '7\.jpg' is not in"):
        open_data(str(root), show=False)


@pytest.mark.parametrize("name", ["train.json", "annotations/instances_train.json", "train.json.gz"])
def test_a_file_that_cannot_be_read_is_told_and_nothing_else_taken_for_the_set(tmp_path, name):
    root = coco_set(tmp_path, "val.json", "images", range(6))
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_bytes(b"\xff\xfe{\0}\0")
    for data in (root, root / name):
        with pytest.raises(UserError) as caught:
            open_splits(data)
        assert str(caught.value) == f"{root / name}: the text is UTF-16; save it as UTF-8"


@pytest.mark.parametrize(("text", "problem"), [("[]", "found a list"), ('{"images": []}', "'annotations' is missing")])
def test_a_json_file_that_is_no_annotation_file_is_answered_with_what_is_wrong(tmp_path, text, problem):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=rf"a\.json: .*{problem}"):
        open_splits(tmp_path / "a.json")


def test_a_validation_file_that_lists_what_occurs_in_it_has_all_categories(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    val = content([annotation(7, 1, 9)])
    val["categories"] = [row for row in val["categories"] if row["name"] == "owl"]
    make_splits(tmp_path, val)
    splits = open_splits(tmp_path)
    assert [c.name for c in splits.val.categories] == ["cat", "dog", "owl"]
    assert splits.val.labels.tolist() == [2]
    assert f"{tmp_path / 'val.json'} lists 1 of 3 categories: it gets all of them." in caplog.messages
    assert [c.image_count for c in splits.val.categories] == [0, 0, 1]
    assert pickle.loads(pickle.dumps(splits.val)).labels.tolist() == [2]
    val["images"] = [row | {"width": 0} for row in val["images"]]  # as it has where it has no sound image
    (tmp_path / "val.json").write_text(json.dumps(val))
    splits = open_data(str(tmp_path), examine=True)
    assert (len(splits.val), [c.name for c in splits.val.categories]) == (0, ["cat", "dog", "owl"])


def test_two_classes_of_one_name_keep_their_ids(tmp_path):
    """All detections of both used to be written under the second id."""
    data = content([])
    data["categories"] = [{"id": 1, "name": "crack"}, {"id": 2, "name": "crack"}, {"id": 5, "name": "Crack"}]
    make_splits(tmp_path, data)
    (tmp_path / "train.json").write_text(json.dumps(data))
    val = open_splits(tmp_path).val
    assert known_categories(val, val.categories, "m") == [1, 2, 5]
    assert known_categories(val, model_of("CRACK", "crack", "Crack", "crack (2)"), "m") == [None, 1, 5, 2]
    assert known_categories(val, model_of("crack", "crack (2)", "CRACK"), "m") == [1, 2, 5]
