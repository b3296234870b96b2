import base64
import json
import re
from io import BytesIO

from checked_data import SOUND, SOUND_VAL, row, write
from PIL import Image
from tiny import assert_done, assert_refused, tailseg
from typer.testing import CliRunner

from tailseg.cli.main import app


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


def test_export_command(tmp_path):
    folder = write(tmp_path / "src", [row(i, i) for i in range(1, 5)], SOUND_VAL)
    done = run("export", "yolo", folder, tmp_path / "yolo", "--quiet")
    assert done.exit_code == 0, done.output
    first, *notes = done.output.splitlines()
    val = json.loads((folder / "val.json").read_text())
    counts = f"4 train images with 4 objects, {len(val['images'])} val images with {len(val['annotations'])} objects"
    assert first == f"{tmp_path / 'yolo'}: {counts}"
    assert notes == ["- images are hard links to the source's files"]
    assert run("check", tmp_path / "yolo", "--quiet").exit_code == 1  # no data folder yet
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
    rows = [*(row(i, i) for i in range(1, 5)), row(9, 1, bbox=[500, 500, 5, 5])]
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
