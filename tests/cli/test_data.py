import base64
import json
import re
from io import BytesIO

import numpy as np
import pytest
import torch
from checked_data import SOUND, SOUND_VAL, row, write
from PIL import Image
from tiny import SMALL_RECIPE, assert_done, assert_refused, tailseg
from typer.testing import CliRunner

from tailseg.checkpoint import save_model
from tailseg.cli.main import app
from tailseg.data.annotations.annotations import Category
from tailseg.data.dataset import DetectionDataset
from tailseg.data.sources import open_data
from tailseg.data.transforms import Compose
from tailseg.model.build import build_detector
from tailseg.model.detector import Detector
from tailseg.recipes.resolve import resolve
from tailseg.structures import RawDetections


def run(*arguments):
    return CliRunner().invoke(app, ["data", *map(str, arguments)])


def test_real_photographs_through_the_command(shared, tmp_path):
    page, out = tmp_path / "page.html", tmp_path / "check.json"
    done = run("check", shared / "data" / "coco128-lvis", "--json", out, "--html", page, "--quiet")
    assert done.exit_code == 0, done.output
    content = json.loads(out.read_text())
    assert content["usable"]
    assert (
        content["splits"]["train"] | {"annotations": 684, "images": 103, "categories_with_objects": 71}
        == (content["splits"]["train"])
    )
    assert [content["groups"][name]["classes"] for name in ("rare", "common", "frequent")] == [39, 32, 9]
    counts = {f["what"].split(":")[0]: f["count"] for f in content["findings"]}
    assert counts["classes without training images"] == 9
    assert counts["images without objects"] == 2
    assert "tailseg train small/seesaw" in done.output
    text = page.read_text()
    assert text.count("<svg") == 4
    assert "http://" not in re.sub(r'xmlns[^=]*="[^"]*"|<!DOCTYPE[^>]*>', "", text).replace("http://www.w3.org", "")
    pictures = re.findall(r"data:image/jpeg;base64,([^\"]+)", text)
    assert 24 <= len(pictures) <= 72
    sides = [max(Image.open(BytesIO(base64.b64decode(picture))).size) for picture in pictures]
    assert set(sides) == {220}


def write_small(folder, side=96):
    """Squares of one colour, of two classes, on noise."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for split, numbers in (("train", range(4)), ("val", range(4, 6))):
        images, annotations = [], []
        for number in numbers:
            pixels = rng.integers(0, 60, (side, side, 3), dtype=np.uint8)
            pixels[20:60, 30:70] = (250, 30, 10)
            Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png", "height": side, "width": side})
            annotations.append(row(number + 1, number, (30, 20, 40, 40), number % 2 + 1))
        categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "owl"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / f"{split}.json").write_text(json.dumps(content))
    return folder


def test_the_recommended_recipe_measures(tmp_path):
    """Unless one is given: images of 96 pixels are to be trained on with a demo recipe."""
    folder, out = write_small(tmp_path / "data"), tmp_path / "check.json"
    assert run("check", folder, "--json", out, "--quiet").exit_code == 0
    content = json.loads(out.read_text())
    assert content["recipe"] == content["suggestion"]["recipe"] == "demo/cross-entropy"
    assert content["scale"]["short_edge"] == resolve("demo/cross-entropy").data.test_short_edge
    assert run("check", folder, "--json", out, "--quiet", "--recipe", "table1/seesaw").exit_code == 0
    content = json.loads(out.read_text())
    assert (content["recipe"], content["scale"]["short_edge"]) == ("table1/seesaw", 800)


@pytest.fixture
def model(tmp_path):
    """Of random weights, for the classes cat and owl."""
    torch.manual_seed(0)
    recipe = resolve("demo/seesaw", SMALL_RECIPE)
    categories = (Category(1, "cat", "f", 9, 9), Category(2, "owl", "f", 9, 9))
    save_model(tmp_path / "m.safetensors", build_detector(recipe, 2), recipe, categories, step=0)
    return tmp_path / "m.safetensors"


def test_labels_that_a_model_disagrees_with(tmp_path, model, monkeypatch):
    """Detections of our own in place of the model's: an owl where image 4 has a cat, and a cat in the corner of 5."""

    def detect(self, batch):
        found = [(4, 1, (30, 20, 70, 60)), (5, 0, (0, 0, 15, 12))]
        return [
            RawDetections(
                image_hw=(96, 96),
                boxes=torch.tensor([box for image, _, box in found if image == image_id]).float(),
                scores=torch.full((1,), 0.875),
                labels=torch.tensor([label for image, label, _ in found if image == image_id]),
                masks=torch.ones(1, 28, 28),
            )
            for image_id in batch.image_ids.tolist()
        ]

    monkeypatch.setattr(Detector, "detect", detect)
    folder, out = write_small(tmp_path / "data"), tmp_path / "check.json"
    done = run("check", folder, "--model", model, "--json", out, "--quiet")
    assert done.exit_code == 0, done.output
    notes = {f["what"]: (f["severity"], f["split"], f["examples"]) for f in json.loads(out.read_text())["findings"]}
    assert notes["annotations in whose place the model finds another class"] == (
        "note", "val", ["image 4 (4.png): annotation 5 is 'cat', found 'owl' with 0.88"]
    )  # fmt: skip
    assert notes["objects that the model finds and nobody annotated"] == (
        "note", "val", ["image 5 (5.png): 'cat' with 0.88 at x 0, y 0, 15 x 12 pixels"]
    )  # fmt: skip


def test_a_model_as_it_is_looks_at_the_validation_images(tmp_path, model):
    done = run("check", write_small(tmp_path / "data"), "--model", model, "--quiet")
    assert done.exit_code == 0, done.output


def test_a_model_of_other_classes_is_refused(tmp_path, model):
    folder = write_small(tmp_path / "data")
    for name in ("train", "val"):
        path = folder / f"{name}.json"
        path.write_text(path.read_text().replace('"owl"', '"hen"'))
    done = run("check", folder, "--model", model, "--quiet")
    assert "has a category 'hen', which" in str(done.exception)


def test_photographs_of_every_suffix_are_imported(tmp_path):
    """As `predict` reads them: the objects of none are lost."""
    source = tmp_path / "src"
    suffixes = [".jpg", ".JPEG", ".jfif", ".gif", ".jp2", ".tif", ".webp", ".bmp", ".ppm"]
    for split, names in (("train", suffixes), ("val", [".png"])):
        for kind in ("images", "labels"):
            (source / kind / split).mkdir(parents=True)
        for number, suffix in enumerate(names):
            Image.new("RGB", (96, 64), (20 * number, 90, 10)).save(source / "images" / split / f"{number}{suffix}")
            (source / "labels" / split / f"{number}.txt").write_text("0 0.1 0.1 0.5 0.1 0.5 0.9\n")
    (source / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [nut]\n")
    done = run("convert", "yolo", source, tmp_path / "out")
    assert f"{len(suffixes)} training images with {len(suffixes)} objects, 1 validation images with 1" in done.output


def test_a_turned_tiff_from_import_to_training(tmp_path):
    """Height 200, width 100 and the object as people see it; `data check` is content, and a sample has that size."""
    source = tmp_path / "src"
    for split, side in (("train", slice(0, 20)), ("val", slice(180, 200))):
        for kind in ("images", "labels"):
            (source / kind / split).mkdir(parents=True)
        stored = np.full((100, 200, 3), 90, np.uint8)  # the camera lay on its side
        stored[:, side] = 255
        Image.fromarray(stored).save(source / "images" / split / "a.tif", tiffinfo={0x0112: 6})
        (source / "labels" / split / "a.txt").write_text("0 0.1 0.1 0.5 0.1 0.5 0.9 0.1 0.9\n")
    (source / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [bolt]\n")
    out = tmp_path / "out"
    assert run("convert", "yolo", source, out).exit_code == 0
    content = json.loads((out / "train.json").read_text())
    assert [(image["height"], image["width"]) for image in content["images"]] == [(200, 100)]
    assert content["annotations"][0]["bbox"] == [10, 20, 40, 160]
    done = run("check", out, "--json", tmp_path / "check.json", "--quiet")
    assert done.exit_code == 0, done.output
    assert [f["what"] for f in json.loads((tmp_path / "check.json").read_text())["findings"]] == []
    splits = open_data(str(out), show=False)
    sample = DetectionDataset(splits.train, Compose(()), drop_empty=True)[0]
    assert tuple(sample.image.shape) == (3, 200, 100)
    assert sample.image[:, :20].min() == 255  # what the camera had on its left is above
    assert sample.instances.boxes.tolist() == [[10, 20, 50, 180]]


def test_data_that_cannot_be_used(tmp_path):
    folder = write(tmp_path, SOUND, SOUND_VAL)
    (folder / "images" / "1.png").unlink()
    done = run("check", folder, "--quiet")
    assert done.exit_code == 1
    assert str(done.exception).startswith(f"{folder}: cannot be trained on: 1 images that are not there (train);")
    assert "Findings" in done.output  # told in full before


def test_convert_and_split_commands(tmp_path):
    folder = write(tmp_path / "src", [row(i, i) for i in range(1, 5)], SOUND_VAL)
    (folder / "val.json").unlink()
    done = run("split", folder, tmp_path / "one", "--val", "0.25", "--quiet")
    assert done.exit_code == 0, done.output
    assert "3 training images with 3 objects, 1 validation images with 1" in done.output
    assert run("convert", "coco", folder, tmp_path / "two").exit_code == 0
    assert run("check", tmp_path / "two", "--quiet").exit_code == 0
    assert run("convert", "tfrecord", folder, tmp_path / "three").exit_code == 2
    assert run("split", folder, tmp_path / "three", "--val", "1").exit_code == 2
    assert "not empty" in str(run("split", folder, tmp_path / "one").exception)


def test_what_is_not_there_cannot_be_divided(tmp_path):
    for source in (tmp_path / "x.json", tmp_path / "x"):
        assert (
            str(run("split", source, tmp_path / "one").exception) == f"{source}: no such folder or file; check the path"
        )
    folder = write(tmp_path / "src", [row(i, i) for i in range(1, 5)], SOUND_VAL)
    assert "it has a val.json already" in str(run("split", folder, tmp_path / "one").exception)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("changes", [{"id": "x"}, {"name": ""}])
def test_faulty_categories_end_the_check_with_a_sentence(tmp_path, split, changes):
    folder = write(tmp_path, SOUND, SOUND_VAL)
    content = json.loads((folder / f"{split}.json").read_text())
    for category in content["categories"]:
        category.update(changes)
    (folder / f"{split}.json").write_text(json.dumps(content))
    done = tailseg("data", "check", folder, "--quiet")
    assert_refused(done, f"{split}.json: category ")
    assert "(1 of 2 such faults)" in done.stderr


@pytest.mark.parametrize("changes", [{"id": "a"}, {"width": 0}, {"height": 70_000}])
def test_a_file_in_which_no_image_is_sound_is_reported(tmp_path, changes):
    """Each split of it has 0 images: the check still lists all findings and names the fix."""
    folder = write(tmp_path, SOUND, SOUND_VAL)
    for split in ("train", "val"):
        content = json.loads((folder / f"{split}.json").read_text())
        for image in content["images"]:
            image.update(changes)
        (folder / f"{split}.json").write_text(json.dumps(content))
    done = run("check", folder, "--quiet", "--json", tmp_path / "check.json")
    assert done.exit_code == 1
    assert str(done.exception).startswith(f"{folder}: cannot be trained on: 4 images without")
    assert "`tailseg data convert coco` writes a copy in which this is done" in str(done.exception)
    findings = json.loads((tmp_path / "check.json").read_text())["findings"]
    errors = [(f["split"], f["count"]) for f in findings if f["severity"] == "error"]
    assert errors == [("train", 4), ("val", 2), ("train", 1)]  # the last: nothing to train on


def test_export_command(tmp_path):
    folder = write(tmp_path / "src", [row(i, i) for i in range(1, 5)], SOUND_VAL)
    done = run("export", "yolo", folder, tmp_path / "yolo", "--quiet")
    assert done.exit_code == 0, done.output
    first, *notes = done.output.splitlines()
    val = json.loads((folder / "val.json").read_text())
    counts = f"4 train images with 4 objects, {len(val['images'])} val images with {len(val['annotations'])} objects"
    assert first == f"{tmp_path / 'yolo'}: {counts}"
    assert notes == ["- images are hard links to the source's files"]
    assert run("convert", "yolo", tmp_path / "yolo", tmp_path / "again").exit_code == 0
    assert run("check", tmp_path / "again", "--quiet").exit_code == 0
    (folder / "val.json").unlink()
    done = run("export", "voc", folder, tmp_path / "voc")
    assert done.output.splitlines()[:2] == [
        f"{tmp_path / 'voc'}: 4 train images with 4 objects",
        "- Pascal VOC has boxes only: the masks are not in it",
    ]
    assert not (tmp_path / "voc/ImageSets/Main/val.txt").exists()
    assert run("export", "tfrecord", folder, tmp_path / "three").exit_code == 2
    assert "not empty" in str(run("export", "coco", folder, tmp_path / "voc").exception)


def test_export_tells_what_reading_dropped(tmp_path):
    beside = {"bbox": [500, 500, 5, 5], "segmentation": [[500, 500, 505, 500, 505, 505]]}
    rows = [*(row(i, i) for i in range(1, 5)), row(9, 1, **beside)]
    done = run("export", "coco", write(tmp_path / "src", rows, SOUND_VAL), tmp_path / "out", "--quiet")
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[1] == (
        f"- {tmp_path / 'src/train.json'}: 4 images, 0 of them without objects; 5 annotations; "
        "1 annotations whose box does not meet the image: left out (annotation 9)."
    )
    content = json.loads((tmp_path / "out/annotations/instances_train.json").read_text())
    assert [item["id"] for item in content["annotations"]] == [1, 2, 3, 4]


def test_check_says_which_rule_made_the_groups(tmp_path):
    folder = write(tmp_path / "src", SOUND, SOUND_VAL)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("extends: demo/seesaw\ndata: {groups: quantiles}\n")
    assert_done(done := tailseg("data", "check", folder))
    assert "Groups: rare up to 10 training images, common up to 100: " in done.stderr
    assert_done(done := tailseg("data", "check", folder, "--recipe", recipe))
    assert "Groups: thirds of the classes: rare up to " in done.stderr
    content = json.loads((folder / "train.json").read_text())
    for category in content["categories"]:
        category["frequency"] = "c"
    (folder / "train.json").write_text(json.dumps(content))
    done = tailseg("data", "check", folder, "--recipe", recipe)
    assert_refused(done, "data.groups = quantiles", "train.json", "remove 'frequency'")
    assert_done(done := tailseg("data", "check", folder))
    assert f"Groups: as {folder / 'train.json'} states them: 0 rare, " in done.stderr


def test_divided_data_states_no_groups_of_the_source(tmp_path):
    folder = write(tmp_path / "src", [row(i, i) for i in range(1, 5)], SOUND_VAL)
    content = json.loads((folder / "train.json").read_text())
    for category in content["categories"]:
        category |= {"frequency": "f", "image_count": 5000, "instance_count": 9000}
    (folder / "train.json").write_text(json.dumps(content))
    for command in (("split", folder / "train.json"), ("convert", "coco", folder / "train.json")):
        out = tmp_path / command[0]
        assert_done(tailseg("data", *command, out))
        for split in ("train", "val"):
            categories = json.loads((out / f"{split}.json").read_text())["categories"]
            assert all(set(category) == {"id", "name"} for category in categories)
        assert_done(done := tailseg("data", "check", out))
        assert "Groups: rare up to 10 training images" in done.stderr


EVIL = "\x1b]0;owned\x07\x1b[2J\u202e<script>alert(1)</script>[red]"


def test_names_from_files_do_nothing_to_the_terminal_or_the_page(tmp_path):
    write_small(tmp_path / "d")
    for split in ("train", "val"):
        path = tmp_path / "d" / f"{split}.json"
        content = json.loads(path.read_text())
        content["categories"][0]["name"] = EVIL + "a" * 10_000
        content["categories"].append({"id": 77, "name": EVIL + "b" * 10_000})
        path.write_text(json.dumps(content))
    page = tmp_path / "page.html"
    done = tailseg("data", "check", tmp_path / "d", "--html", page)
    assert done.returncode == 0, done.stderr
    for text in (done.stdout, done.stderr, page.read_text()):
        assert not set("\x1b\x07\u202e") & set(text)
    assert "<script>alert" not in page.read_text()
    assert len(done.stdout) < 20_000
    refused = tailseg("data", "check", tmp_path / (EVIL.replace("/", "") + "\n" + "x" * 100), "--quiet")
    assert refused.returncode == 1
    assert refused.stderr.startswith("tailseg: ")
    assert refused.stderr.count("\n") == 1
    assert not set("\x1b\x07\u202e") & set(refused.stderr)
    assert "\\x1b]0;owned\\x07" in refused.stderr


def test_a_name_of_any_length_is_cut_in_the_sentence(tmp_path):
    write_small(tmp_path / "d")
    path = tmp_path / "d" / "val.json"
    content = json.loads(path.read_text())
    content["categories"][0]["name"] = "\x1b[2J" + "x" * 10_000
    path.write_text(json.dumps(content))
    refused = tailseg("data", "check", tmp_path / "d", "--quiet")
    assert refused.returncode == 1
    assert "\x1b" not in refused.stderr
    assert len(refused.stderr) < 2000
    assert refused.stderr.endswith(
        "both files need the same categories: `tailseg data convert coco` matches them by name\n"
    )
