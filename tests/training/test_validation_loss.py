"""Losses on the validation split: what they are, and that measuring them changes nothing."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import SMALL_RECIPE
from torch import Tensor, nn

from tailseg.data.batches import collate
from tailseg.data.dataset import DetectionDataset
from tailseg.data.sources import DataSplits, open_data
from tailseg.data.synthetic.generate import SyntheticSettings, write_synthetic
from tailseg.data.transforms import fit_transform
from tailseg.model.build import build_detector
from tailseg.model.detector import Detector
from tailseg.recipes.resolve import resolve
from tailseg.recipes.schema import Recipe
from tailseg.structures import Batch
from tailseg.training.class_statistics import class_statistics
from tailseg.training.learner import Learner, WholeDetector, seed_of_step
from tailseg.training.loop import train
from tailseg.training.validation_loss import validation_sums

VAL_IMAGES, CLASSES = 5, 4
SETTINGS = (
    *SMALL_RECIPE,
    "optimizer={name: adamw, lr: 0.001, clip: 10}",
    "schedule={epochs: 2, milestones: [], warmup_steps: 2}",
    "training={log_steps: 3, evaluate_every: 1}",
)
# Learnt batch statistics and all that counts or draws in a loss.
LEARNS = ("model.backbone.train_norm=true", "model.mask_head.norm=true", "model.box_head.convs=1")


def recipe(*settings: str) -> Recipe:
    return resolve("demo/seesaw", [*SETTINGS, *settings])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = SyntheticSettings(classes=CLASSES, train_images=12, val_images=VAL_IMAGES, size=64, rarest=3)
    return write_synthetic(tmp_path_factory.mktemp("set") / "data", settings)


@pytest.fixture(scope="module")
def data(folder: Path) -> DataSplits:
    return open_data(str(folder))


def measured(learner: Learner, data: DataSplits, wanted: Recipe, **share: int) -> dict[str, float]:
    assert data.val is not None
    where = {"rank": 0, "world": 1} | share
    return validation_sums(
        *(learner, learner.trained, data.val, wanted, 32, torch.device("cpu")),
        rank=where["rank"],
        world=where["world"],
        show=False,
    )


def made(data: DataSplits, wanted: Recipe) -> tuple[Detector, Learner]:
    assert data.train is not None
    torch.manual_seed(0)
    detector = build_detector(wanted, CLASSES, class_statistics(data.train))
    return detector, WholeDetector(detector, wanted, None, None, pin_memory=False)  # type: ignore[arg-type]


def by_hand(detector: Detector, data: DataSplits, wanted: Recipe) -> dict[str, float]:
    """Losses of each batch of two images, the last of one, weighted by images."""
    assert data.val is not None
    dataset = DetectionDataset(data.val, fit_transform(64, 64), drop_empty=False, mask_grid=28)
    sums: dict[str, float] = {}
    own = copy.deepcopy(detector).eval()
    for number, start in enumerate(range(0, VAL_IMAGES, 2)):
        samples = [dataset[index] for index in range(start, min(start + 2, VAL_IMAGES))]
        torch.manual_seed(seed_of_step(0, number, 0))
        with torch.no_grad():
            losses = own(collate(samples))
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(samples)
    return sums


def test_sums_over_all_images(data: DataSplits) -> None:
    wanted = recipe()
    detector, learner = made(data, wanted)
    found = measured(learner, data, wanted)
    assert found.pop("images") == VAL_IMAGES
    assert found == {name: pytest.approx(value, rel=1e-6) for name, value in by_hand(detector, data, wanted).items()}
    assert set(found) == {"rpn_objectness", "rpn_box", "classes", "objectness", "box", "mask"}


def test_shares_of_two_processes_make_up_the_whole(data: DataSplits) -> None:
    wanted = recipe("data.batch_per_device=1")
    _, learner = made(data, wanted)
    shares = [measured(learner, data, wanted, rank=rank, world=2) for rank in (0, 1)]
    assert [share["images"] for share in shares] == [3, 2]
    assert measured(learner, data, wanted, rank=7, world=9) == {"images": 0}


@pytest.mark.parametrize("loss", ["seesaw", "eql-v2", "eql"])
def test_nothing_is_changed(data: DataSplits, loss: str) -> None:
    wanted = recipe(f"classifier.loss={loss}", *LEARNS)
    detector, learner = made(data, wanted)
    detector.train()
    detector.neck.eval()  # some parts may be in another mode
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    modes = [module.training for module in detector.modules()]
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    states = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    first = measured(learner, data, wanted)
    assert torch.get_rng_state().equal(states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # type: ignore[index]  # noqa: NPY002
    assert [module.training for module in detector.modules()] == modes
    after = detector.state_dict()
    assert all(value.equal(after[name]) for name, value in before.items())
    assert all(parameter.grad is None for parameter in detector.parameters())
    assert measured(learner, data, wanted) == first


@pytest.mark.parametrize("settings", [LEARNS, ("training.ema=0.5",)])
def test_a_run_is_the_same_to_the_bit(data: DataSplits, tmp_path: Path, settings: tuple[str, ...]) -> None:
    train(recipe(*settings), data, tmp_path / "off", show=False)
    train(recipe(*settings, "training.validation_loss=true"), data, tmp_path / "on", show=False)
    for name in ("last.safetensors", "best.safetensors", "trainer.safetensors"):
        off, on = load_file(tmp_path / "off" / name), load_file(tmp_path / "on" / name)
        assert off.keys() == on.keys()
        assert all(value.equal(on[key]) for key, value in off.items())


def evaluations(out: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if "metrics" in row]


def test_it_is_of_the_model_that_is_saved_and_said(
    data: DataSplits, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from tailseg.checkpoint import load_model

    caplog.set_level("INFO", logger="tailseg")
    wanted = recipe("training.ema=0.5", "training.validation_loss=true")
    train(wanted, data, tmp_path / "run", show=False)
    assert data.train is not None
    detector, _ = made(data, wanted)
    detector.load_state_dict(load_model(tmp_path / "run" / "last.safetensors").state)
    sums = by_hand(detector, data, wanted)
    row = evaluations(tmp_path / "run")[-1]["validation"]
    assert row == {
        "loss": pytest.approx(sum(sums.values()) / VAL_IMAGES, rel=1e-5),
        **{name: pytest.approx(value / VAL_IMAGES, rel=1e-5) for name, value in sums.items()},
    }
    assert any(message.endswith(f", validation loss {row['loss']:.4g}.") for message in caplog.messages)


def test_finetuning_measures_the_losses_of_its_branches(data: DataSplits, tmp_path: Path) -> None:
    train(recipe("schedule.epochs=1"), data, tmp_path / "model", show=False)
    settings = ("finetune.enabled=true", "training.validation_loss=true", "schedule.epochs=1")
    init = tmp_path / "model" / "last.safetensors"
    train(recipe(*settings), data, tmp_path / "run", init=init, show=False)
    (row,) = evaluations(tmp_path / "run")
    assert set(row["validation"]) == {"loss", "classes", "objectness"}
    assert 0 < row["validation"]["loss"] < 5
    train(recipe(*settings[::2]), data, tmp_path / "off", init=init, show=False)
    off, on = (load_file(tmp_path / name / "last.safetensors") for name in ("off", "run"))
    assert all(value.equal(on[key]) for key, value in off.items())


def test_where_it_cannot_be_had_the_run_goes_on(
    data: DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(self: WholeDetector, trained: nn.Module, batch: Batch, seed: int) -> dict[str, Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(WholeDetector, "losses_with", fails)
    assert train(recipe("training.validation_loss=true", "schedule.epochs=1"), data, tmp_path / "run", show=False)
    (row,) = evaluations(tmp_path / "run")
    assert "validation" not in row
    assert "Epoch 1: no validation loss (OutOfMemoryError: CUDA out of memory); the run goes on without it." in (
        caplog.messages
    )


def test_it_may_be_switched_on_when_a_run_goes_on(data: DataSplits, tmp_path: Path) -> None:
    train(recipe("schedule.epochs=1"), data, tmp_path / "run", show=False)
    more = recipe("training.validation_loss=true", "training.loggers=[csv]")
    train(more, data, tmp_path / "run", resume=True, show=False)
    assert ["validation" in row for row in evaluations(tmp_path / "run")] == [False, True]
    assert (tmp_path / "run" / "csv" / "metrics.csv").is_file()
