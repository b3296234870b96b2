"""The command line as a user meets it.

Commands run in this process (`tiny.tailseg`), but for those that are killed, stopped, short of disk, or several at
once.
"""

import gzip
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import ENVIRONMENT, Done, assert_refused, command, options, tailseg

from tailseg.data.synthetic.generate import SyntheticSettings, write_synthetic
from tailseg.recipes.ladder import REPORT
from tailseg.recipes.resolve import BUILT_IN

RECIPE = """
extends: demo/seesaw
model:
  backbone: {name: test_efficientnet, pretrained: false, frozen_stages: -1}
  neck: {channels: 16}
  rpn: {pre_nms_train: 50, pre_nms_test: 50, post_nms_train: 40, post_nms_test: 20}
  box_head: {width: 32, rois: 32, max_positive: 8}
  mask_head: {channels: 8, convs: 1}
data: {batch_per_device: 2, workers: 0, short_edges: [64], test_short_edge: 64, long_edge: 64, mask_grid: 28}
optimizer: {name: adamw, lr: 0.001, weight_decay: 0.01, clip: 10}
schedule: {epochs: 2, milestones: [1]}
training: {evaluate_every: 2, save_steps: 2}
test: {max_detections: 20}
"""
IMAGES, STEPS = 12, 12  # training images with objects; steps of the two epochs


def start(*arguments: object) -> subprocess.Popen[str]:
    """Start the real command in a process group of its own, as a terminal does."""
    pipe, line = subprocess.PIPE, command(*arguments)
    return subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT, start_new_session=True)


def on_a_full_disk(limit: int, *arguments: object) -> Done:
    """Run the real command where no file may grow beyond ``limit`` bytes."""
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, env=ENVIRONMENT, timeout=240,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------
# Data, recipe and one trained model


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound data set."""
    settings = SyntheticSettings(classes=4, train_images=IMAGES, val_images=4, size=64, rarest=3)
    return write_synthetic(tmp_path_factory.mktemp("plain") / "data", settings)


@pytest.fixture(scope="module")
def data(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with all that is odd but allowed: PNG with alpha, grey and CMYK JPEG, empty box, empty images."""
    folder = tmp_path_factory.mktemp("odd") / "data"
    shutil.copytree(plain, folder)
    for split in ("train", "val"):
        content = orjson.loads((folder / f"{split}.json").read_bytes())
        images, first = content["images"], content["images"][0]
        for row, (mode, suffix) in zip(images, (("RGBA", ".png"), ("L", ".jpg"), ("CMYK", ".jpg")), strict=False):
            picture = Image.open(folder / "images" / row["file_name"]).convert(mode)
            row["file_name"] = f"{split}-{mode}{suffix}"
            picture.save(folder / "images" / row["file_name"])
        shutil.copy(folder / "images" / first["file_name"], folder / "images" / f"{split}-empty.png")
        images.append({**first, "id": 1000, "file_name": f"{split}-empty.png"})
        if split == "train":
            box = {**content["annotations"][0], "id": 9999, "bbox": [10.0, 10.0, 0.0, 20.0]}
            box["segmentation"] = [[-30, -30, -20, -30, -20, -20]]
            content["annotations"].append(box)
        (folder / f"{split}.json").write_bytes(orjson.dumps(content))
    return folder


@pytest.fixture(scope="module")
def trained(recipe: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """A run that nobody interrupted."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    return out, tailseg("train", recipe, "--data", data, "--out", out)


def saved_step(path: Path) -> int:
    with safe_open(path, framework="pt") as file:
        return int(json.loads(file.metadata()["step"]))


def test_train_with_odd_but_sound_data(trained: tuple[Path, Done]) -> None:
    out, done = trained
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert f"train.json: {IMAGES + 1} images, 1 of them without objects" in done.stderr
    assert "1 annotations whose box does not meet the image: left out (annotation 9999)." in done.stderr
    assert f"{IMAGES} training images, 4 classes" in done.stderr
    assert "Learning rate 0.00025 = 0.001 x 2 / 8" in done.stderr
    assert "Groups: as " in done.stderr
    assert "segm AP" in done.stderr
    assert "AP50" in done.stdout
    names = {path.name for path in out.iterdir()}
    assert names == {
        "best.safetensors",
        "last.safetensors",
        "trainer.safetensors",
        "metrics.jsonl",
        "metrics.json",
        "detections.json",
        "classes.csv",
        "recipe.yaml",
    }
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6, 8, 10, 12]
    assert [(row["step"], row["epoch"]) for row in rows if "metrics" in row] == [(STEPS, 2)]
    assert saved_step(out / "last.safetensors") == STEPS


def test_eval_with_settings_of_the_test(trained: tuple[Path, Done], data: Path, tmp_path: Path) -> None:
    model = trained[0] / "last.safetensors"
    done = tailseg("eval", model, "--data", data, "--out", tmp_path, "--set", "test.max_detections=1")
    assert done.returncode == 0, done.stderr
    images = [row["image_id"] for row in orjson.loads((tmp_path / "detections.json").read_bytes())]
    assert 0 < len(images) == len(set(images))
    refused = tailseg("eval", model, "--data", data, "--out", tmp_path, "--set", "classifier.p=0")
    assert_refused(refused, "classifier.p=0", "train again")


def test_eval_and_score_agree(trained: tuple[Path, Done], data: Path, tmp_path: Path) -> None:
    model = trained[0] / "last.safetensors"
    done = tailseg("eval", model, "--data", data, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "5 images, 1 of them without objects" in done.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    keys = ["AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf", "AR300", "ARs300", "ARm300", "ARl300"]
    assert {kind: list(values) for kind, values in metrics.items()} == {"bbox": keys, "segm": keys}
    assert all(value is None or 0 <= value <= 1 for values in metrics.values() for value in values.values())
    # What training wrote in its last evaluation is what eval finds.
    assert metrics == json.loads((trained[0] / "metrics.json").read_text())
    rows = orjson.loads((tmp_path / "detections.json").read_bytes())
    val = orjson.loads((data / "val.json").read_bytes())
    assert {row["image_id"] for row in rows} <= {image["id"] for image in val["images"]}
    assert {row["category_id"] for row in rows} <= {category["id"] for category in val["categories"]}
    assert all(row["segmentation"]["size"] == [64, 64] and 0 < row["score"] <= 1 for row in rows)
    assert all(row["bbox"][2] >= 0 and row["bbox"][3] >= 0 and len(row["bbox"]) == 4 for row in rows)
    done = tailseg("score", data / "val.json", tmp_path / "detections.json", "--iou", "bbox", "--out", tmp_path / "s")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "s").read_text()) == {"bbox": metrics["bbox"]}


def test_eval_says_where_the_groups_come_from(trained: tuple[Path, Done], data: Path, tmp_path: Path) -> None:
    model = trained[0] / "last.safetensors"
    done = tailseg("eval", model, "--data", data, "--out", tmp_path / "stated")
    assert f"Groups: as {data / 'val.json'} states them: " in done.stderr
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "images").symlink_to(data / "images")
    for split in ("train", "val"):
        content = orjson.loads((data / f"{split}.json").read_bytes())
        content["categories"] = [{"id": row["id"], "name": row["name"]} for row in content["categories"]]
        (bare / f"{split}.json").write_bytes(orjson.dumps(content))
    done = tailseg("eval", model, "--data", bare, "--out", tmp_path / "computed")
    assert f"Groups: those that {model} was trained with." in done.stderr
    stated, computed = ((tmp_path / name / "classes.csv").read_text() for name in ("stated", "computed"))
    assert stated == computed


def test_predict(trained: tuple[Path, Done], data: Path, tmp_path: Path) -> None:
    images = data / "images"
    broken = tmp_path / "broken.jpg"
    broken.write_bytes((images / "train-L.jpg").read_bytes()[:400])
    out = tmp_path / "out"
    (out / "deeper").mkdir(parents=True)
    inside = out / "photo.png"  # an input that lies where the results go
    shutil.copy(images / "train-RGBA.png", inside)
    before = inside.read_bytes()
    twin = out / "deeper" / "photo.jpg"
    shutil.copy(images / "train-L.jpg", twin)
    inputs = [images / "train-RGBA.png", broken, images / "train-L.jpg", images / "train-CMYK.jpg", inside, twin]
    done = tailseg("predict", trained[0] / "best.safetensors", *inputs, "--out", out, "--score", "0", "--quiet")
    assert_refused(done, str(broken), "broken or cut off")
    assert done.stdout.startswith("5 pictures, ")
    assert "1 not readable" in done.stdout
    stems = {"train-RGBA", "train-L", "train-CMYK", "photo-2", "photo-3"}
    assert {path.name for path in out.glob("*.json")} == {f"{stem}.json" for stem in stems}
    assert {path.name for path in out.glob("*.png")} == {f"{stem}.png" for stem in stems} | {"photo.png"}
    assert inside.read_bytes() == before
    content = json.loads((out / "photo-3.json").read_text())
    assert (content["image"], content["height"], content["width"]) == (str(twin), 64, 64)
    assert len(content["detections"]) > 0
    found = content["detections"][0]
    assert set(found) == {"category_id", "category", "score", "bbox", "segmentation"}
    assert np.asarray(Image.open(out / "photo-3.png")).shape == (512, 512, 3)  # enlarged: names need room


# ---------------------------------------------------------------------------------------------------------
# Stopped and resumed


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Until the file is there; fails if the process ends before."""
    end = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.005)


def without_speed(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "images_per_second"} for row in rows]


def assert_same_run(out: Path, reference: Path) -> None:
    for name in ("last.safetensors", "trainer.safetensors"):
        ours, theirs = load_file(out / name), load_file(reference / name)
        assert ours.keys() == theirs.keys()
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def test_killed_then_disk_full_then_resumed(
    trained: tuple[Path, Done], recipe: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    train = ("train", recipe, "--data", data, "--out", out)
    process = start(*train)
    wait_for(out / "trainer.safetensors", process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    step = saved_step(out / "trainer.safetensors")
    assert 0 < step < STEPS
    kept = {name: (out / name).read_bytes() for name in ("trainer.safetensors", "last.safetensors")}
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "loss": 99.0}\n{"step": 12, "lo')  # as a kill may leave it
    # The disk is full: the checkpoints of before survive, and nothing half written stays.
    done = on_a_full_disk(100_000, *train, "--resume", "--quiet")
    assert_refused(done, str(out), "could not be saved", "--resume")
    assert {name: (out / name).read_bytes() for name in kept} == kept
    assert not list(out.glob(".*.part"))
    # A run goes on only as the one that it was.
    assert_refused(tailseg(*train, "--resume", "--seed", 1, "--quiet"), str(out), "seed 1", "began with 0")
    done = tailseg(*train, "--resume")
    assert done.returncode == 0, done.stderr
    assert f"from step {step} on" in done.stderr
    assert_same_run(out, trained[0])
    assert without_speed(out / "metrics.jsonl") == without_speed(trained[0] / "metrics.jsonl")


def test_stopped_by_ctrl_c_and_resumed(trained: tuple[Path, Done], recipe: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train = ("train", recipe, "--data", data, "--out", out, "--set", "data.workers=1")
    process = start(*train)
    wait_for(out / "trainer.safetensors", process)
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does: the workers get it too
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "--resume" in errors
    assert "Traceback" not in errors
    assert 0 < saved_step(out / "trainer.safetensors") < STEPS
    done = tailseg(*train, "--resume", "--quiet")
    assert done.returncode == 0, done.stderr
    assert_same_run(out, trained[0])


def test_two_processes(recipe: Path, data: Path, tmp_path: Path) -> None:
    # The real command, in a file that also has each process write down what it holds at the end.
    script = tmp_path / "observed.py"
    script.write_text(
        """
import os, torch
from pathlib import Path
from tailseg.cli.main import main
from tailseg.losses.seesaw import SeesawLoss
from tailseg.training.loop import Run

mine = torch.zeros(4, dtype=torch.int64)
count, save = SeesawLoss._add, Run.save

def counted(self, labels, valid=None, **options):
    kept = labels if valid is None else labels[valid]
    mine.add_(torch.bincount(kept[kept < 4], minlength=4))  # 4 is background, which is not counted
    count(self, labels, valid, **options)

def saved(self):
    state = {key: value for key, value in self.detector.state_dict().items()}
    torch.save({"state": state, "mine": mine}, Path(os.environ["OBSERVED"]) / f"{self.fabric.global_rank}.pt")
    save(self)

SeesawLoss._add, Run.save = counted, saved
main()
"""
    )
    arguments = [script, "train", recipe, "--data", data, "--devices", 2, "--set", "training.log_steps=1"]
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, "OBSERVED": str(tmp_path)},
        cwd=tmp_path,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    (out,) = (tmp_path / "runs").iterdir()  # nobody named a folder, and both took the same
    assert done.stderr.count("Learning rate 0.0005 = 0.001 x 4 / 8") == 1
    assert done.stdout.count("Models:") == 1
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(value, second["state"][key]) for key, value in first["state"].items())
    saved = load_file(out / "last.safetensors")
    assert all(torch.equal(value, saved[key]) for key, value in first["state"].items())
    counts = next(value for key, value in saved.items() if key.endswith(".counts"))
    assert first["mine"].sum() > 0
    assert second["mine"].sum() > 0
    assert torch.equal(counts, first["mine"] + second["mine"])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS // 2 + 1))
    assert np.isfinite(losses).all()
    assert sum("metrics" in row for row in rows) == 1
    assert {row["image_id"] for row in orjson.loads((out / "detections.json").read_bytes())} == {
        image["id"] for image in orjson.loads((data / "val.json").read_bytes())["images"]
    }


# ---------------------------------------------------------------------------------------------------------
# Input at fault


Change = Callable[[dict[str, Any]], None]


def with_change(plain: Path, folder: Path, change: Change) -> Path:
    """The data set with its train.json changed; the images are a link to the originals."""
    folder.mkdir()
    content = orjson.loads((plain / "train.json").read_bytes())
    change(content)
    (folder / "train.json").write_bytes(orjson.dumps(content))
    shutil.copy(plain / "val.json", folder)
    (folder / "images").symlink_to(plain / "images")
    return folder


def cut_json(plain: Path, folder: Path) -> Path:
    folder = with_change(plain, folder, lambda content: None)
    whole = (folder / "train.json").read_bytes()
    (folder / "train.json").write_bytes(whole[: len(whole) // 2])
    return folder


def cut_image(plain: Path, folder: Path) -> Path:
    shutil.copytree(plain, folder)
    path = folder / "images" / "train_000003.jpg"
    path.write_bytes(path.read_bytes()[:500])
    return folder


def other_size(plain: Path, folder: Path) -> Path:
    shutil.copytree(plain, folder)
    Image.new("RGB", (64, 60)).save(folder / "images" / "val_000001.jpg")
    return folder


def set_in(table: str, **values: Any) -> Change:
    return lambda content: content[table][2].update(values)


DATA_FAULTS: dict[str, tuple[Callable[[Path, Path], Path], tuple[str, ...]]] = {
    "missing folder": (lambda plain, folder: folder, ("no such folder",)),
    "image absent": (
        lambda plain, folder: with_change(plain, folder, set_in("images", file_name="gone.jpg")),
        ("train.json", "image 3", "'gone.jpg'"),
    ),
    "file name climbs out": (
        lambda plain, folder: with_change(plain, folder, set_in("images", file_name="../../secret.jpg")),
        ("train.json", "image 3", "'../../secret.jpg'", "leads out"),
    ),
    "JSON cut": (cut_json, ("train.json", "cut off", "line 1, column")),
    "no such category": (
        lambda plain, folder: with_change(plain, folder, set_in("annotations", category_id=77)),
        ("train.json", "annotation 3", "category_id 77"),
    ),
    "duplicate ids": (
        lambda plain, folder: with_change(plain, folder, set_in("images", id=1)),
        ("train.json", "image 1", "more than once"),
    ),
    "validation image of another size": (other_size, ("val_000001.jpg", "is 64 x 60 pixels", "says 64 x 64")),
    "truncated JPEG": (cut_image, ("train_000003.jpg", "broken or cut off")),
}


def random_bytes(path: Path, trained: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(5000))


def no_recipe(path: Path, trained: Path) -> None:
    save_file({"weight": torch.zeros(3)}, path)


def pickled(path: Path, trained: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, path)


def cut_checkpoint(path: Path, trained: Path) -> None:
    path.write_bytes((trained / "last.safetensors").read_bytes()[:100_000])


MODEL_FAULTS: dict[str, tuple[str, Callable[[Path, Path], None], str]] = {
    "missing": ("gone.safetensors", lambda path, trained: None, "no such file"),
    "random bytes": ("noise.safetensors", random_bytes, "not a tailseg checkpoint"),
    "no recipe": ("other.safetensors", no_recipe, "carries no recipe"),
    "pickle": ("model.pth", pickled, "not a tailseg checkpoint"),
    "cut": ("cut.safetensors", cut_checkpoint, "not a tailseg checkpoint"),
}


@pytest.fixture(scope="module")
def refusals(
    plain: Path, data: Path, recipe: Path, trained: tuple[Path, Done], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Done]:
    """Every fault that takes PyTorch to be found: name -> how the command ended."""
    root = tmp_path_factory.mktemp("faults")
    run = trained[0]
    jobs: dict[str, tuple[Any, ...]] = {}
    for name, (make, _) in DATA_FAULTS.items():
        folder = make(plain, root / name.replace(" ", "-"))
        jobs[name] = ("train", recipe, "--data", folder, "--out", root / f"run {name}", "--set", "data.workers=1")
    for name, (file, fill, _) in MODEL_FAULTS.items():
        fill(root / file, run)
        jobs[name] = ("eval", root / file, "--data", plain, "--out", root / f"eval {name}")
    other = with_change(plain, root / "renamed", lambda content: content["categories"][1].update(name="zebra"))
    (other / "val.json").write_bytes((other / "train.json").read_bytes())
    again = ("train", recipe, "--data", data, "--out", run)
    jobs["other categories"] = ("eval", run / "last.safetensors", "--data", other, "--out", root / "eval")
    jobs["holds a run"] = again
    jobs["nothing to resume"] = (*again[:-1], root / "empty", "--resume")
    jobs["other recipe"] = (*again, "--resume", "--set", "optimizer.weight_decay=0.5")
    wild = ("optimizer.lr=1e12", "optimizer.clip=null", "schedule.warmup_steps=0")
    jobs["diverged"] = (*again[:-1], root / "diverged", *options(wild))
    jobs["out is a file"] = (*again[:-1], recipe)
    done = {name: tailseg(*job, "--quiet") for name, job in jobs.items()}
    assert not [name for name in DATA_FAULTS if (root / f"run {name}").exists()]  # found before the first step
    return done


@pytest.mark.parametrize("name", DATA_FAULTS)
def test_faulty_data(refusals: dict[str, Done], name: str) -> None:
    assert_refused(refusals[name], name.replace(" ", "-"), *DATA_FAULTS[name][1])


@pytest.mark.parametrize("name", MODEL_FAULTS)
def test_faulty_model(refusals: dict[str, Done], name: str) -> None:
    file, _, named = MODEL_FAULTS[name]
    assert_refused(refusals[name], file, named)


def test_faulty_runs(refusals: dict[str, Done], trained: tuple[Path, Done], recipe: Path) -> None:
    run = str(trained[0])
    assert_refused(refusals["other categories"], "val.json", "last.safetensors", "'zebra'")
    assert_refused(refusals["holds a run"], run, "already holds a run", "--resume")
    assert_refused(refusals["nothing to resume"], "empty", "no trainer.safetensors")
    assert_refused(refusals["other recipe"], run, "optimizer.weight_decay = 0.5", "began with 0.01")
    assert_refused(refusals["diverged"], "training diverged", "optimizer.lr")
    assert_refused(refusals["out is a file"], str(recipe))


# ---------------------------------------------------------------------------------------------------------
# Commands that need no model


def test_recipe_faults(tmp_path: Path, plain: Path) -> None:
    files = {
        "unknown.yaml": "extends: demo/seesaw\noptimizer: {learning_rate: 1}\n",
        "type.yaml": "extends: demo/seesaw\nschedule: {epochs: many}\n",
        "one.yaml": "extends: two.yaml\n",
        "two.yaml": "extends: one.yaml\n",
        "orphan.yaml": "extends: demo/sesaw\n",
        "broken.yaml": "model: [1,\nx: 2\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    cases: list[tuple[tuple[object, ...], tuple[str, ...]]] = [
        (("demo/seasaw",), ("'demo/seasaw'", "'demo/seesaw'")),
        (("demo/seesaw", "--set", "optimizer.learning=1"), ("'optimizer.learning'", "nearest valid key", "optimizer.")),
        (("demo/seesaw", "--set", "schedule.epochs=many"), ("schedule.epochs", "integer", "'many'")),
        (("demo/seesaw", "--set", "optimizer.lr"), ("--set optimizer.lr", "KEY=VALUE")),
        ((tmp_path / "unknown.yaml",), ("unknown.yaml", "'optimizer.learning_rate'", "nearest valid key")),
        ((tmp_path / "type.yaml",), ("type.yaml", "schedule.epochs", "'many'")),
        ((tmp_path / "one.yaml",), ("one.yaml", "circle")),
        ((tmp_path / "orphan.yaml",), ("'demo/sesaw'", "'demo/seesaw'", "orphan.yaml")),
        ((tmp_path / "broken.yaml",), ("broken.yaml: not valid YAML at line 2;", "fix the file")),
        ((tmp_path / "gone.yaml",), ("gone.yaml", "cannot be read")),
    ]
    for arguments, named in cases:
        assert_refused(tailseg("recipes", "show", *arguments), *named)
    done = tailseg("train", "demo/seasaw", "--data", plain, "--out", tmp_path / "run")
    assert_refused(done, "'demo/seasaw'", "'demo/seesaw'")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("setting", ["data.rare_max=2", "data.common_max=50", "data.groups=quantiles"])
def test_a_group_rule_that_the_file_overrides(plain: Path, tmp_path: Path, setting: str) -> None:
    done = tailseg("train", "demo/seesaw", "--data", plain, "--out", tmp_path / "run", "--set", setting)
    key, _, value = setting.partition("=")
    assert_refused(done, f"{key} = {value}: {plain / 'train.json'} and {plain / 'val.json'} state", "leave", "remove")
    assert not (tmp_path / "run").exists()


def test_recipes_list_show_and_diff(tmp_path: Path) -> None:
    listed = tailseg("recipes", "list")
    assert listed.returncode == 0
    words = [line.split() for line in listed.stdout.splitlines() if line]
    names = [line[0] for line in words]
    assert [name for name in BUILT_IN if name not in names] == []  # each can be copied as it stands
    ladder = [line for line in words if line[0].removeprefix("table2/") in REPORT]
    assert [line[0] for line in ladder] == [f"table2/{row}" for row in REPORT]
    assert ladder[0][-5:] == ["20.1", "18.7", "1.0", "16.1", "29.4"]
    assert ladder[-1][-5:] == ["41.5", "38.8", "26.4", "38.3", "44.9"]
    assert ladder[0][1:4] == ["Mask", "R-CNN", "50.4"]
    assert tailseg("recipes").stdout == listed.stdout
    shown = tailseg("recipes", "show", "table1/seesaw", "--set", "classifier.p=0.6")
    path = tmp_path / "seesaw.yaml"
    path.write_text(shown.stdout)
    assert "seesaw" in shown.stdout
    differs = tailseg("recipes", "diff", "table1/seesaw", path)
    assert (differs.returncode, differs.stdout) == (0, "classifier.p: 0.8 -> 0.6\n")


def test_usage(tmp_path: Path) -> None:
    for arguments in (
        ("fly",),
        ("train", "demo/seesaw"),
        ("train", "demo/seesaw", "--data", tmp_path, "--out", tmp_path, "--devices", "0"),
        ("eval", tmp_path / "m", "--data", tmp_path, "--split", "test"),
        ("predict", tmp_path / "m", "--out", tmp_path),
    ):
        done = tailseg(*arguments)
        assert done.returncode == 2, (arguments, done.stderr)
        assert "Traceback" not in done.stderr
    assert "Usage" in tailseg("train", "demo/seesaw").stderr
    script = Path(sys.executable).with_name("tailseg")  # the installed command, where there is one
    line = [script, "demo", "--help"] if script.exists() else command("demo", "--help")
    done = subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0
    assert "--seeds" in done.stdout


def test_data_synth(tmp_path: Path) -> None:
    out = tmp_path / "set"
    synth = ("data", "synth", out, "--classes", 4, "--images", 8, "--val-images", 2, "--size", 64)
    done = on_a_full_disk(1000, *synth)
    assert_refused(done, "make room")
    assert list(tmp_path.iterdir()) == []
    done = tailseg(*synth)
    assert done.returncode == 0, done.stderr
    assert "8 training and 2 validation images of 4 classes" in done.stdout
    assert len(list((out / "images").iterdir())) == 10
    assert len(orjson.loads((out / "train.json").read_bytes())["categories"]) == 4
    before = (out / "train.json").read_bytes()
    assert_refused(tailseg(*synth), str(out), "not empty")
    assert (out / "train.json").read_bytes() == before
    assert_refused(tailseg("data", "synth", tmp_path / "none", "--classes", 0), "classes is 0")


def test_score_equals_lvis_api(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "lvis-val-100"
    expected = json.loads((folder / "expected.json").read_text())
    truth, detections = folder / "lvis_val_100.json", folder / "dets_bbox_segm.json.gz"
    out = tmp_path / "metrics.json"
    done = tailseg("score", truth, detections, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "AP75" in done.stdout
    ours = json.loads(out.read_text())
    for kind in ("bbox", "segm"):
        theirs = {key.replace("@", ""): value for key, value in expected[kind].items()}
        assert ours[kind] == pytest.approx(theirs, abs=1e-9)
    rows = orjson.loads(gzip.decompress(detections.read_bytes()))
    bare = tmp_path / "bare.json"
    bare.write_bytes(orjson.dumps([{key: row[key] for key in row if key != "bbox"} for row in rows]))
    assert tailseg("score", truth, bare, "--iou", "segm", "--out", out).returncode == 0
    theirs = {key.replace("@", ""): value for key, value in expected["segm_bbox_removed"].items()}
    assert json.loads(out.read_text())["segm"] == pytest.approx(theirs, abs=2e-4)


def test_score_refuses(tmp_path: Path, plain: Path) -> None:
    (tmp_path / "cut.json").write_text('[{"image_id": 1')
    (tmp_path / "none.json").write_text("[]")
    score = ("score", plain / "val.json")
    assert_refused(tailseg(*score, tmp_path / "gone.json"), "gone.json")
    assert_refused(tailseg(*score, tmp_path / "cut.json"), "cut.json")
    done = tailseg(*score, tmp_path / "none.json", "--iou", "keypoints")
    assert_refused(done, "keypoints")
    done = tailseg(*score, tmp_path / "none.json", "--out", tmp_path / "no" / "such" / "metrics.json")
    assert_refused(done, "metrics.json", "No such file or directory")
