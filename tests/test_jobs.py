"""From Python: train, evaluate and score do what the commands do, wherever they are called."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import ENVIRONMENT, SMALL_RECIPE, options, tailseg

import tailseg as package
from tailseg.checkpoint import read_tensors
from tailseg.data.synthetic.generate import SyntheticSettings, write_synthetic
from tailseg.errors import UserError
from tailseg.outcomes import Evaluated, Trained

# One epoch of six steps; frozen stages would be frozen at random weights.
SETTINGS = (*SMALL_RECIPE, "schedule={epochs: 1, milestones: []}", "training={evaluate_every: 1, log_steps: 2}")
SCRIPT = """
import sys, tailseg
recipe, data, out = sys.argv[1:4]
trained = tailseg.train(recipe, data, out, devices=int(sys.argv[4]))
print(trained.model, trained.metrics is None)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = SyntheticSettings(classes=4, train_images=12, val_images=4, size=64, rarest=3)
    return write_synthetic(tmp_path_factory.mktemp("data") / "data", settings)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shown = tailseg("recipes", "show", "demo/seesaw", *options(SETTINGS))
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(shown.stdout)
    return path


@pytest.fixture(scope="module")
def trained(recipe: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return package.train(recipe, data, tmp_path_factory.mktemp("run") / "run", training__save_steps=3, show=False)


def test_training_returns_scores_and_files(trained: Trained):
    assert trained.last == trained.out / "last.safetensors"
    assert trained.model == (trained.best or trained.last)
    assert trained.model.is_file()
    assert trained.metrics == json.loads((trained.out / "metrics.json").read_text())
    assert trained.classes is not None
    assert [row["name"] for row in trained.classes] == [c.name for c in package.load(trained.model).categories]
    recipe = package.recipes.get(trained.out / "recipe.yaml")
    assert recipe.training.save_steps == 3


def test_a_finished_run_that_is_resumed_returns_its_scores(trained: Trained, recipe: Path, data: Path):
    again = package.train(recipe, data, trained.out, resume=True, training__save_steps=3, show=False)
    assert again == trained
    line = ("train", recipe, "--data", data, "--out", trained.out, "--resume", "--set", "training.save_steps=3")
    done = tailseg(*line, "--quiet")
    assert done.returncode == 0, done.stderr
    assert "APr" in done.stdout
    assert f"{trained.last}" in done.stdout


def test_an_evaluation_is_that_of_the_command(trained: Trained, data: Path, tmp_path: Path):
    by_command = tailseg("eval", trained.last, "--data", data, "--out", tmp_path / "command", "--max-dets", 5)
    assert by_command.returncode == 0
    found = package.evaluate(str(trained.last), str(data), tmp_path / "python", max_dets=5, show=False)
    assert isinstance(found, Evaluated)
    for file in found.files:
        assert file.read_bytes() == (tmp_path / "command" / file.name).read_bytes()
    assert [file.name for file in found.files] == ["metrics.json", "detections.json"]
    assert found.metrics == json.loads(found.files[0].read_text())
    assert f"Written: {tmp_path / 'command' / 'metrics.json'}, " in by_command.stdout


def test_an_evaluation_of_what_is_open_already(trained: Trained, data: Path, tmp_path: Path):
    splits = package.open_data(data, need=("val",), show=False)
    model = package.load(trained.last)
    found = package.evaluate(model, splits, show=False, analyse=True)
    names = ("metrics.json", "analysis.html", "thresholds.json", "detections.json")
    assert found.files == tuple(trained.out / "eval-data-val" / name for name in names)
    assert all(file.is_file() for file in found.files)
    assert found.analysis is not None
    assert found.page == found.files[1]
    page = found.page.read_text()
    for part in (str(trained.last), "data, val", "20 detections an image, NMS at IoU 0.5, 64 x 64 pixels"):
        assert part in page
    assert "data:image/jpeg;base64," in page  # the worst pictures
    assert set(json.loads(found.files[2].read_text())) == {"default", "classes"}
    with pytest.raises(UserError, match=r"without its split train; open it with need=\['train', 'val'\]"):
        package.train("small/seesaw", splits, tmp_path, show=False)
    with pytest.raises(ValueError, match="test__nms_iou: a model that was loaded"):
        package.evaluate(model, splits, test__nms_iou=0.6, show=False)
    with pytest.raises(ValueError, match="split is 'train' or 'val', received 'test'"):
        package.evaluate(model, splits, split="test")
    with pytest.raises(ValueError, match="device: a model that was loaded has its settings"):
        package.evaluate(model, splits, device="cpu", show=False)
    model.path = None
    with pytest.raises(ValueError, match="out="):
        package.evaluate(model, splits, show=False)


def test_a_run_is_a_model_and_a_device_is_checked_first(trained: Trained, tmp_path: Path):
    with pytest.raises(UserError, match=r"^device 'gpu': there is no such device; did you mean 'cuda'"):
        package.train("small/seesaw", tmp_path / "gone", tmp_path / "run", device="gpu")
    with pytest.raises(UserError, match=r"^device 'gpu'"):
        package.evaluate(trained.out, tmp_path / "gone", device="gpu")
    with pytest.raises(UserError, match=r"gone: no such folder or file"):
        package.evaluate(trained.out, tmp_path / "gone", device="cpu", show=False)


def test_training_starts_from_a_run(trained: Trained, recipe: Path, data: Path, tmp_path: Path):
    again = package.train(recipe, data, tmp_path / "run", init=trained.out, schedule__epochs=1, show=False)
    assert again.last.is_file()
    with pytest.raises(UserError, match=r"^--init cocoo: there is no such file; did you mean coco"):
        package.train(recipe, data, tmp_path / "other", init="cocoo", show=False)


def test_scoring(trained: Trained, data: Path, tmp_path: Path):
    found = package.evaluate(trained.last, data, tmp_path, show=False)
    scores = package.score(data / "val.json", found.files[-1], iou_types=["segm"], out=tmp_path / "scores.json")
    assert scores.metrics["segm"] == found.metrics["segm"]
    assert json.loads((tmp_path / "scores.json").read_text()) == scores.metrics
    rows = json.loads(found.files[-1].read_text())
    assert package.score(str(data / "val.json"), rows).metrics == found.metrics


def test_scores_have_no_analysis_of_earlier_ones_beside_them(trained: Trained, data: Path, tmp_path: Path):
    out = tmp_path / "scores.json"
    rows = json.loads((trained.out / "detections.json").read_text())
    package.score(data / "val.json", rows, out=out, analyse=True, show=False)
    assert {path.name for path in tmp_path.glob("scores.*.*")} == {
        *("scores.classes.csv", "scores.analysis.json", "scores.analysis.html", "scores.thresholds.json")
    }
    package.score(data / "val.json", rows, out=out, show=False)
    assert {path.name for path in tmp_path.iterdir()} == {"scores.json", "scores.classes.csv"}


def test_numbers_of_numpy_are_numbers(recipe: Path, data: Path, tmp_path: Path):
    seed, epochs = np.arange(4)[3], np.int64(1)
    run = package.train(recipe, data, tmp_path / "run", seed=seed, schedule__epochs=epochs, show=False)
    assert read_tensors(tmp_path / "run" / "trainer.safetensors")[1]["seed"] == 3
    given = {"test__nms_iou": np.float32(0.5), "test__max_detections": np.int64(5), "test__tta": np.bool_(0)}
    found = package.evaluate(run.last, data, tmp_path / "found", show=False, **given)
    least = package.evaluate(run.last, data, tmp_path, max_dets=np.int64(5), show=False)
    assert least.files[-1].read_bytes() == found.files[-1].read_bytes()
    rows = json.loads(found.files[-1].read_text())
    scores = package.score(data / "val.json", rows, max_dets=np.int64(5))
    assert scores.metrics == least.metrics


@pytest.mark.parametrize("seed", [-1, 2**63, None, 0.5, "0"])
def test_a_seed_out_of_range_is_refused_first(seed: Any, tmp_path: Path):
    with pytest.raises(UserError) as error:
        package.train("no recipe", tmp_path / "gone", tmp_path / "run", seed=seed)
    assert str(error.value) == f"seed: expected a whole number from 0 to 2^63 - 1, received {seed!r}"


def test_the_largest_seed(recipe: Path, data: Path, tmp_path: Path):
    package.train(recipe, data, tmp_path / "run", seed=2**63 - 1, show=False)
    done = tailseg("train", recipe, "--data", data, "--out", tmp_path / "other", "--seed", 2**63)
    assert done.returncode == 2
    assert "--seed" in done.stderr
    assert not (tmp_path / "other").exists()


def test_training_in_a_thread(trained: Trained, recipe: Path, data: Path, tmp_path: Path):
    results: list[Trained] = []

    def job() -> None:
        results.append(package.train(recipe, data, tmp_path / "run", training__save_steps=3, show=False))

    thread = threading.Thread(target=job)
    thread.start()
    thread.join()
    assert results[0].metrics == trained.metrics
    ours, theirs = load_file(results[0].last), load_file(trained.last)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_another_default_type_changes_nothing(trained: Trained, recipe: Path, data: Path, tmp_path: Path):
    torch.set_default_dtype(torch.float64)
    try:
        again = package.train(recipe, data, tmp_path / "run", training__save_steps=3, show=False)
        found = package.evaluate(again.last, data, tmp_path / "found", show=False)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert again.metrics == trained.metrics == found.metrics
    ours, theirs = load_file(again.last), load_file(trained.last)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_progress_is_reported_where_nobody_set_up_logging(trained: Trained, data: Path):
    """A notebook or a prompt: `__main__` has no file, and nothing is configured."""
    lines = f"""
import tailseg
found = tailseg.evaluate({str(trained.last)!r}, {str(data)!r})
found = tailseg.evaluate({str(trained.last)!r}, {str(data)!r}, show=False)
try:
    tailseg.train("small/seesaw", {str(data)!r}, "run", devices=2)
except tailseg.UserError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable], input=lines, capture_output=True, text=True, env=ENVIRONMENT, cwd=trained.out
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Groups: ") == 1
    assert "devices=2: several processes need a script" in done.stdout


def test_a_script_with_two_processes(recipe: Path, data: Path, tmp_path: Path):
    script = tmp_path / "own_training.py"
    script.write_text(SCRIPT)
    line = [sys.executable, str(script), str(recipe), str(data), str(tmp_path / "run"), "2"]
    done = subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, timeout=240)
    assert done.returncode == 0, done.stderr
    last = tmp_path / "run" / "last.safetensors"
    assert last.is_file()
    assert sorted(line.split()[1] for line in done.stdout.splitlines()) == ["False", "True"]


def test_what_the_package_offers():
    assert set(dir(package)) == set(package.__all__)
    assert {"train", "evaluate", "score", "open_data", "recipes", "losses", "load", "Detections"} <= set(dir(package))
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match=r"no attribute 'trian'; it has .*train"):
        package.trian  # noqa: B018
