"""`tailseg convert` as a user meets it, and what the other commands do with its result."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
import yaml
from tiny import Done, assert_done, options, tailseg

SMALL = ("data.test_short_edge=128", "data.long_edge=160")
# For training in seconds on images of 96 pixels; SGD without warm-up from converted weights.
TRAINING = (
    "data.short_edges=[96]",
    "data.test_short_edge=96",
    "data.long_edge=128",
    "data.workers=0",
    "data.mask_grid=28",
    "data.flip=0",
    "model.backbone.frozen_stages=-1",
    "model.rpn.post_nms_train=100",
    "model.box_head.rois=64",
    "model.box_head.max_positive=16",
    "optimizer.name=adamw",
    "optimizer.lr=0.002",
    "optimizer.reference_batch=2",
    "optimizer.clip=10",
    "schedule.epochs=8",
    "schedule.milestones=[7]",
    "schedule.warmup_steps=1",
    "training.evaluate_every=8",
    "training.log_steps=1",
    "test.max_detections=10",
)


@pytest.fixture(scope="module")
def checkpoint(shared: Path) -> Path:
    return shared / "reference" / "model_mask_rcnn.pth"


@pytest.fixture(scope="module")
def data(shared: Path) -> Path:
    return shared / "data" / "coco128-lvis"


@pytest.fixture(scope="module")
def converted(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    out = tmp_path_factory.mktemp("converted") / "model.safetensors"
    return out, tailseg("convert", "mmdet", checkpoint, out)


def first_images(data: Path, folder: Path, images: int) -> Path:
    """A YAML file of the first images of a data set, the same for training and validation."""
    content = orjson.loads((data / "train.json").read_bytes())
    known = {"person", "bicycle", "car", "dog", "cup", "bottle", "cat", "bus"}
    ids = {c["id"] for c in content["categories"] if c["name"] in known}
    wanted = [a for a in content["annotations"] if a["category_id"] in ids]
    chosen = sorted({a["image_id"] for a in wanted})[:images]
    content["images"] = [row for row in content["images"] if row["id"] in chosen]
    content["annotations"] = [a for a in wanted if a["image_id"] in chosen]
    for split in ("train", "val"):
        (folder / f"{split}.json").write_bytes(orjson.dumps(content))
    (folder / "images").symlink_to(data / "images")
    return folder


def test_the_command_says_what_it_wrote(converted: tuple[Path, Done]) -> None:
    out, done = converted
    assert_done(done)
    assert done.stdout == (
        f"{out}: Mask R-CNN, resnet50, 37 classes, classifier seesaw; its recipe: tailseg recipes show {out}\n"
    )
    assert done.stderr == ""
    assert [path.name for path in out.parent.iterdir()] == ["model.safetensors"]


def test_recipes_show(converted: tuple[Path, Done]) -> None:
    done = tailseg("recipes", "show", converted[0])
    assert_done(done)
    recipe = yaml.safe_load(done.stdout)
    assert recipe["name"] == "mmdet/model_mask_rcnn"
    assert recipe["classifier"]["loss"] == "seesaw"
    assert recipe["model"]["backbone"]["stem_channels"] == 8
    assert recipe["model"]["neck"]["channels"] == 32


def test_a_recipe_file_may_extend_a_converted_model(converted: tuple[Path, Done], tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(f"extends: {converted[0]}\nschedule: {{epochs: 3, milestones: [2]}}\n")
    done = tailseg("recipes", "diff", converted[0], tmp_path / "own.yaml")
    assert_done(done)
    assert "schedule.epochs" in done.stdout
    assert "model." not in done.stdout


def test_predict(converted: tuple[Path, Done], data: Path, tmp_path: Path) -> None:
    image = sorted((data / "images").iterdir())[0]
    done = tailseg("predict", converted[0], image, "--out", tmp_path, "--score", "0", "--quiet")
    assert_done(done)
    found = json.loads((tmp_path / f"{image.stem}.json").read_text())["detections"]
    assert len(found) == 300
    names = {row["category"] for row in found}
    assert names <= set(class_names(converted[0]))
    scores = [row["score"] for row in found]
    assert scores == sorted(scores, reverse=True)
    assert 1e-4 < scores[-1] <= scores[0] <= 1
    assert (tmp_path / f"{image.stem}.png").is_file()


def class_names(model: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(model, framework="pt") as file:
        return [category["name"] for category in json.loads(file.metadata()["categories"])]


def test_eval_on_data_with_more_classes(converted: tuple[Path, Done], data: Path, tmp_path: Path) -> None:
    """37 of its 80; categories are found by name, whatever their ids."""
    done = tailseg("eval", converted[0], "--data", data, "--out", tmp_path, *options(SMALL))
    assert_done(done)
    assert "knows 37 of the 80 categories" in done.stderr
    rows = orjson.loads((tmp_path / "detections.json").read_bytes())
    val = orjson.loads((data / "val.json").read_bytes())
    ids = {c["name"]: c["id"] for c in val["categories"]}
    assert rows
    assert {row["category_id"] for row in rows} <= {ids[name] for name in class_names(converted[0])}
    assert {row["image_id"] for row in rows} <= {image["id"] for image in val["images"]}
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics.keys() == {"bbox", "segm"}
    assert all(value is None or 0 <= value <= 1 for kind in metrics.values() for value in kind.values())


def test_training_from_converted_weights(converted: tuple[Path, Done], data: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    small = first_images(data, tmp_path / "data", images=8)
    out = tmp_path / "run"
    done = tailseg(
        "train", converted[0], "--init", converted[0], "--data", small, "--out", out, "--quiet", *options(TRAINING)
    )
    assert_done(done)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 32  # 8 images, 2 a step, 8 epochs
    first, last = sum(losses[:4]) / 4, sum(losses[-4:]) / 4
    assert last < 0.8 * first
    assert len(class_names(out / "best.safetensors")) == 80


def test_cascade_with_a_setting(shared: Path, tmp_path: Path) -> None:
    out = tmp_path / "folder" / "cascade.safetensors"
    done = tailseg(
        "convert", "mmdet", shared / "reference" / "model_cascade.pth", out, *options(("test.score_threshold=0.05",))
    )
    assert_done(done)
    assert done.stdout.startswith(f"{out}: Cascade Mask R-CNN, resnet50, 37 classes, classifier seesaw; ")
    shown = tailseg("recipes", "show", out, *options(("test.nms_iou=0.4",)))
    assert_done(shown)
    assert yaml.safe_load(shown.stdout)["test"] == {
        "score_threshold": 0.05, "nms_iou": 0.4, "max_detections": 300, "stage_average": "logits", "min_size": None,
        "tau_norm": 0.0, "tta": False, "tta_long_edges": None, "tta_flip": True,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------
# Refusals


class Runs:
    """Runs something when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.marker),))


@pytest.mark.slow
def test_refusals(checkpoint: Path, converted: tuple[Path, Done], tmp_path: Path) -> None:
    """Exit code 1, one line on stderr that names the file, and nothing written; usage gives 2."""
    state = torch.load(checkpoint, weights_only=True)
    no_names = tmp_path / "no-names.pth"
    torch.save({"state_dict": state["state_dict"]}, no_names)
    more = tmp_path / "htc.pth"
    torch.save(state | {"state_dict": state["state_dict"] | {"roi_head.semantic_head.x": torch.zeros(1)}}, more)
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps({"categories": [{"id": 1, "name": "aardvark"}]}))
    marker = tmp_path / "marker"
    runs = tmp_path / "runs.pth"
    runs.write_bytes(pickle.dumps({"model": Runs(marker)}))
    text = tmp_path / "text.pkl"
    text.write_text("no checkpoint")
    out, there = tmp_path / "o.safetensors", converted[0]
    size = there.stat().st_size
    cases: list[tuple[tuple[object, ...], tuple[str, ...]]] = [
        (("mmdet", tmp_path / "absent.pth", out), (str(tmp_path / "absent.pth"),)),
        (("mmdet", runs, out), (str(runs), "mkdir", "not loaded")),
        (("mmdet", no_names, out), (str(no_names), "--categories")),
        (("mmdet", more, out), (str(more), "roi_head.semantic_head.x", "HTC's semantic branch")),
        (("mmdet", checkpoint, out, "--categories", wrong), (str(wrong), "'person'")),
        (("mmdet", checkpoint, there), (str(there), "already exists")),
        (("detectron2", text, out), (str(text),)),
        (("torchvision", "maskrcnn_resnet50_fpn_v2", out), ("maskrcnn_resnet50_fpn_v2",)),
    ]
    usage: list[tuple[object, ...]] = [
        ("mmdet",),
        ("mmdet", checkpoint),
        ("mmdet", checkpoint, out, "--explain"),
        ("mmdet", checkpoint, out, "--categorys", wrong),
        ("mmdetection", checkpoint, out),
    ]
    refused = [tailseg("convert", *arguments) for arguments, _ in cases]
    misused = [tailseg("convert", *arguments) for arguments in usage]
    for (arguments, named), done in zip(cases, refused, strict=True):
        lines = done.stderr.strip().splitlines()
        assert done.returncode == 1, (arguments, done.stderr)
        assert len(lines) == 1, (arguments, done.stderr)
        assert lines[0].startswith("tailseg: ")
        assert all(name in lines[0] for name in named), (named, lines[0])
        assert done.stdout == ""
    for arguments, done in zip(usage, misused, strict=True):
        assert done.returncode == 2, (arguments, done.stderr)
        assert "Traceback" not in done.stderr
    assert not marker.exists()
    assert not out.exists()
    assert there.stat().st_size == size


def test_explain_prints_the_map_and_writes_nothing(shared: Path, tmp_path: Path) -> None:
    state = torch.load(shared / "reference" / "model_mask_rcnn.pth", weights_only=True)
    checkpoint = tmp_path / "m.pth"
    torch.save(state, checkpoint)
    done = tailseg("convert", "mmdet", checkpoint, "--explain")
    assert_done(done)
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["backbone.conv1.weight", "->", "backbone.net.conv1.weight", "(8,", "3,", "7,", "7)"]
    assert f"{len(state['state_dict'])} tensors with a place, 0 left over, 0 missing" in done.stdout
    assert lines[-1] == "It can be converted: resnet50, 37 classes, loss seesaw."
    more = {"roi_head.semantic_head.x": torch.zeros(1)}
    torch.save(state | {"state_dict": state["state_dict"] | more}, checkpoint)
    done = tailseg("convert", "mmdet", checkpoint, "--explain")
    assert done.returncode == 1
    assert "Left over, of HTC's semantic branch, on no cascade:\n  roi_head.semantic_head.x\n" in done.stdout
    assert "left over: 'roi_head.semantic_head.x' of HTC's semantic branch, on no cascade" in done.stderr
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_help_names_the_projects() -> None:
    done = tailseg("convert", "--help")
    assert_done(done)
    assert all(project in done.stdout for project in ("mmdet", "torchvision", "detectron2"))
