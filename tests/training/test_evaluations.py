"""What an evaluation in training tells: that nothing was found, once; sample pictures, and that they cannot be had."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import SMALL_RECIPE

from tailseg.data.sources import DataSplits, open_data
from tailseg.data.synthetic.generate import SyntheticSettings, write_synthetic
from tailseg.model.build import build_detector
from tailseg.recipes.resolve import resolve
from tailseg.recipes.schema import Recipe
from tailseg.training import evaluations
from tailseg.training.loop import train
from tailseg.training.sample_pictures import PICTURES, sample_pictures

VAL_IMAGES = 9
SETTINGS = (
    *SMALL_RECIPE,
    "optimizer={name: adamw, lr: 0.001, clip: 10}",
    "schedule={epochs: 2, milestones: [], warmup_steps: 2}",
    "training.evaluate_every=1",
)


def recipe(*settings: str) -> Recipe:
    return resolve("demo/seesaw", [*SETTINGS, *settings])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSplits:
    settings = SyntheticSettings(classes=4, train_images=8, val_images=VAL_IMAGES, size=64, rarest=3)
    return open_data(str(write_synthetic(tmp_path_factory.mktemp("set") / "data", settings)))


def test_a_sound_run_warns_of_nothing(data: DataSplits, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(recipe(), data, tmp_path / "run", show=False)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == []


def test_a_threshold_above_all_scores_is_told_once(
    data: DataSplits, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(recipe("test.score_threshold=0.9"), data, tmp_path / "run", show=False)
    (said,) = [message for message in caplog.messages if "not one detection" in message]
    assert said == (
        "Epoch 1: not one detection on the validation split: all scores are below test.score_threshold = 0.9; lower "
        "that."
    )


def test_a_model_that_has_learnt_nothing_is_told(
    data: DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = evaluations.evaluate

    def finds_nothing(*args: Any, **options: Any) -> Any:
        scores = whole(*args, **options)
        (tmp_path / "run" / "detections.json").write_text("[]\n")
        return scores

    monkeypatch.setattr(evaluations, "evaluate", finds_nothing)
    train(recipe(), data, tmp_path / "run", show=False)
    (said,) = [message for message in caplog.messages if "not one detection" in message]
    assert "after 4 steps the model has learnt too little: train for more epochs or raise optimizer.lr" in said


def test_pictures_are_of_the_same_images_each_time(data: DataSplits) -> None:
    assert data.val is not None
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        detector = build_detector(recipe(), 4).eval()
        found.append(list(sample_pictures(detector, data.val, recipe().data, torch.device("cpu"))))
    names = [[name for name, _ in pictures] for pictures in found]
    assert names[0] == names[1]
    assert len(set(names[0])) == PICTURES == 6
    for (_, one), (_, other) in zip(*found, strict=True):
        assert one.dtype == np.uint8
        assert one.shape[1] > 2 * 480  # of 64 pixels, enlarged, beside each other
        half = one.shape[1] // 2
        assert (one[:500, :half] == other[:500, :half]).all()  # what is annotated stays; what is found does not
        assert (one[:500, half:] != other[:500, half:]).any()


def test_pictures_that_cannot_be_drawn_cost_no_training(
    data: DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorboard")

    def fails(*_: Any) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(evaluations, "sample_pictures", fails)
    scores = train(recipe("training.loggers=[tensorboard]"), data, tmp_path / "run", show=False)
    assert scores is not None
    assert [message for message in caplog.messages if "pictures" in message] == [
        "Sample pictures cannot be drawn (no room); the run goes on without them."
    ]
