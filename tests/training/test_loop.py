"""Training in this process, on a set of a dozen pictures; the command line's tests kill and interrupt real ones."""

import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import SMALL_RECIPE
from torch import Tensor

from tailseg.checkpoint import read_tensors, write_tensors
from tailseg.data.annotations.annotations import Annotations, load_annotations
from tailseg.data.dataset import evaluation_dataset, train_dataset
from tailseg.data.sources import DataSplits, open_data
from tailseg.data.synthetic.generate import SyntheticSettings, write_synthetic
from tailseg.errors import UserError
from tailseg.recipes.resolve import resolve
from tailseg.recipes.schema import Recipe
from tailseg.recipes.values import override, to_yaml
from tailseg.training.class_statistics import class_statistics
from tailseg.training.distributed import launch
from tailseg.training.loop import Run, train
from tailseg.training.resumption import read_trainer
from tailseg.training.run_lock import run_lock
from tailseg.training.run_log import RunLog

TINY = (
    *SMALL_RECIPE,
    "optimizer={name: adamw, lr: 0.001, weight_decay: 0.01, clip: 10}",
    "schedule={epochs: 1, milestones: [1], warmup_steps: 4, warmup_factor: 0.1}",
    "training.evaluate_every=1",
)
IMAGES, STEPS = 12, 6


def tiny(*settings: str) -> Recipe:
    return resolve("demo/seesaw", [*TINY, *settings])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSplits:
    settings = SyntheticSettings(classes=4, train_images=IMAGES, val_images=4, size=64, rarest=3)
    return open_data(str(write_synthetic(tmp_path_factory.mktemp("set") / "data", settings)))


@pytest.fixture(scope="module")
def reference(data: DataSplits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch with seed 0, not interrupted."""
    out = tmp_path_factory.mktemp("reference") / "run"
    scores = train(tiny(), data, out, show=False)
    assert scores is not None
    assert json.loads((out / "metrics.json").read_text()) == scores.metrics
    return out


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function: from now on runs stop after this step, as if told to by a signal."""
    return lambda step: monkeypatch.setattr(Run, "agreed", lambda self, stop: self.step == step)


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def differing(one: Path, other: Path, name: str = "last.safetensors") -> list[str]:
    a, b = load_file(one / name), load_file(other / name)
    assert a.keys() == b.keys()
    return [key for key in a if not torch.equal(a[key], b[key])]


@pytest.mark.parametrize("settings", [(), ("data.workers=2",)])
def test_same_seed_same_weights(data: DataSplits, reference: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    torch.manual_seed(99)  # whatever the process did before
    np.random.seed(99)  # noqa: NPY002  (the legacy generator is what must not matter)
    train(tiny(*settings), data, tmp_path / "run", show=False)
    assert differing(tmp_path / "run", reference) == []
    assert differing(tmp_path / "run", reference, "trainer.safetensors") == []


def test_other_seed_other_weights(data: DataSplits, reference: Path, tmp_path: Path) -> None:
    train(tiny(), data, tmp_path / "run", seed=1, show=False)
    parameters = [key for key in load_file(reference / "last.safetensors") if key.endswith((".weight", ".bias"))]
    assert set(parameters) <= set(differing(tmp_path / "run", reference))


@pytest.mark.parametrize("step", [1, 4, 6])
def test_stopped_and_resumed(
    data: DataSplits, reference: Path, tmp_path: Path, stop_at: Callable[[int], None], step: int
) -> None:
    """After the first step, in the middle and after the last one, with other numbers of workers.

    Ctrl-C in the last step of an epoch does not wait for the evaluation, which --resume makes up for.
    """
    out = tmp_path / "run"
    stop_at(step)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), data, out, show=False)
    assert not (out / "metrics.json").exists()
    stop_at(-1)
    train(tiny("data.workers=1"), data, out, resume=True, show=False)
    assert differing(out, reference) == []
    assert differing(out, reference, "trainer.safetensors") == []
    assert differing(out, reference, "best.safetensors") == []
    assert (out / "metrics.json").read_bytes() == (reference / "metrics.json").read_bytes()
    assert [row["step"] for row in rows(out) if "loss" in row] == sorted({step, STEPS})
    assert [row["step"] for row in rows(out) if "metrics" in row] == [STEPS]


def test_resuming_cuts_the_log(data: DataSplits, tmp_path: Path, stop_at: Callable[[int], None]) -> None:
    out = tmp_path / "run"
    stop_at(2)
    recipe = tiny("training.log_steps=1", "schedule.epochs=2")
    with pytest.raises(KeyboardInterrupt):
        train(recipe, data, out, show=False)
    assert [row["step"] for row in rows(out)] == [1, 2]
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 5.0}\n{"step": 3, "metr')
    stop_at(4)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, data, out, resume=True, show=False)
    assert [row["step"] for row in rows(out)] == [1, 2, 3, 4]
    assert all(row["loss"] != 5.0 for row in rows(out))


def test_what_the_log_says(reference: Path, data: DataSplits, tmp_path: Path, stop_at: Callable[[int], None]) -> None:
    stop_at(6)
    with pytest.raises(KeyboardInterrupt):
        train(tiny("training.log_steps=1"), data, tmp_path / "run", show=False)
    each = [row for row in rows(tmp_path / "run") if "loss" in row]
    # lr 0.001 for 8 images, here 2; warm-up over four steps from a tenth.
    assert [row["lr"] for row in each] == pytest.approx([0.00025 * f for f in (0.1, 0.325, 0.55, 0.775, 1, 1)])
    names = {"rpn_objectness", "rpn_box", "classes", "objectness", "box", "mask"}
    for row in each:
        assert set(row) == {"step", "loss", "lr", "images_per_second", "gradient", "silent"} | names
        assert row["loss"] == pytest.approx(sum(row[name] for name in names), rel=1e-6)
    (whole,) = [row for row in rows(reference) if "loss" in row]
    for name in ("loss", *names):  # a line is the mean over the steps since the line before
        assert whole[name] == pytest.approx(np.mean([row[name] for row in each]), rel=1e-5)
    assert [row["epoch"] for row in rows(reference) if "metrics" in row] == [1]
    assert (reference / "recipe.yaml").read_text() == to_yaml(tiny())


def test_an_epoch_of_repeat_factors_is_longer_and_says_so(
    data: DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert data.train is not None
    ids = seen(monkeypatch, learning=False)
    caplog.set_level("INFO", logger="tailseg")
    train(tiny("data.sampler=repeat-factor", "data.repeat_threshold=1"), data, tmp_path / "run", show=False)
    # By hand, of the file: every class that is not in all images is repeated, rounded up.
    held = [{data.train.labels[row] for row in data.train.rows(i)} for i in range(IMAGES)]
    due = [max(math.sqrt(IMAGES / sum(c in other for other in held)) for c in own) for own in held]
    length = sum(math.ceil(factor) for factor in due)
    assert length > IMAGES
    stated = f"Repeat factors: {IMAGES} images make {length} an epoch, r up to {max(due):.2f}."
    assert stated in caplog.messages
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == -(-length // 2)
    counts = [ids.count(int(image)) for image in data.train.image_ids]
    missing = [n - math.ceil(factor) for n, factor in zip(counts, due, strict=True)]
    assert min(missing) >= 0
    assert sum(missing) == -length % 2  # the last batch is filled up


@pytest.mark.parametrize(
    ("settings", "length", "stated"),
    [
        (
            ("data.sampler=[random, class-aware]", "data.epoch_images=8"),
            8,
            f"An epoch has 8 images, drawn from {IMAGES}.",
        ),
        (
            ("data.sampler=irfs", "data.repeat_threshold=1", "data.epoch_images=9"),
            9,
            f"Repeat factors: {IMAGES} images make 9",
        ),
    ],
)
def test_an_epoch_is_as_long_as_the_recipe_says(
    settings: tuple[str, ...], length: int, stated: str,
    data: DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    ids = seen(monkeypatch, learning=False)
    caplog.set_level("INFO", logger="tailseg")
    train(tiny(*settings), data, tmp_path / "run", show=False)
    assert any(message.startswith(stated) for message in caplog.messages)
    assert len(ids) == 2 * -(-length // 2)
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == -(-length // 2)


def test_all_augmentation_at_once_trains_and_resumes_to_the_bit(
    data: DataSplits, tmp_path: Path, stop_at: Callable[[int], None]
) -> None:
    recipe = tiny(
        *("data.copy_paste=1", "data.colour_jitter=0.4", "data.long_edges=[32,128]", "data.crop=64"),
        *(
            "data.instaboost=0.5",
            "data.sampler=[repeat-factor, irfs]",
            "data.epoch_images=6",
            "data.repeat_threshold=1",
        ),
    )
    train(recipe, data, tmp_path / "whole", show=False)
    stop_at(2)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, data, tmp_path / "run", show=False)
    train(recipe, data, tmp_path / "run", resume=True, show=False)
    assert differing(tmp_path / "whole", tmp_path / "run") == []


def seen(monkeypatch: pytest.MonkeyPatch, *, learning: bool = True) -> list[int]:
    """Collects the ids of the images that training batches hold; the model may not look at them, which is faster."""
    from tailseg.model.detector import Detector

    ids: list[int] = []
    forward = Detector.forward

    def watched(self: Detector, batch: Any) -> dict[str, Tensor]:
        ids.extend(batch.image_ids.tolist())
        return forward(self, batch) if learning else weights_alone(self)

    monkeypatch.setattr(Detector, "forward", watched)
    return ids


def weights_alone(model: torch.nn.Module) -> dict[str, Tensor]:
    """A loss that looks at no image."""
    return {"loss": torch.stack([parameter.square().sum() for parameter in model.parameters()]).sum()}


def test_accumulation(data: DataSplits, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = seen(monkeypatch)
    train(tiny("data.batch_per_device=1", "training.accumulate=2"), data, tmp_path / "run", show=False)
    assert sorted(ids) == list(range(1, IMAGES + 1))  # one epoch, each image once
    losses = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in losses] == [STEPS]
    assert losses[0]["lr"] == pytest.approx(0.00025)  # still two images a step
    (whole,) = [row["loss"] for row in rows(reference) if "loss" in row]
    assert losses[0]["loss"] == pytest.approx(whole, rel=0.5)


def gradients_of_first_step(
    data: DataSplits, out: Path, monkeypatch: pytest.MonkeyPatch, *settings: str
) -> dict[str, Tensor]:
    """The gradients that the optimiser is given in the first step."""
    found: dict[str, Tensor] = {}

    def keep(self: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        for group in self.param_groups:
            for index, parameter in enumerate(group["params"]):
                assert parameter.grad is not None
                found[str(index)] = parameter.grad.clone()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", keep)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(*settings), data, out, show=False)
    return found


def norm(gradients: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))


def test_clipping(data: DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = gradients_of_first_step(data, tmp_path / "raw", monkeypatch, "optimizer.clip=null")
    assert norm(raw) > 0.1
    clipped = gradients_of_first_step(data, tmp_path / "clipped", monkeypatch, "optimizer.clip=0.1")
    factor = 0.1 / (norm(raw) + 1e-6)
    for key, value in raw.items():
        torch.testing.assert_close(clipped[key], value * factor, rtol=1e-4, atol=1e-8)
    loose = gradients_of_first_step(data, tmp_path / "loose", monkeypatch, "optimizer.clip=1e6")
    assert all(torch.equal(loose[key], value) for key, value in raw.items())


def test_accumulated_gradient_is_the_mean(data: DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches of one image: the gradient is half the sum of the two, each on the loss of its own image."""
    from tailseg.model.detector import Detector

    alone = {}

    # With the loss replaced by the sum of one layer's weights times the image's id, the gradient is known.
    def known(self: Detector, batch: Any) -> dict[str, Tensor]:
        total = sum(parameter.sum() for parameter in self.parameters() if parameter.requires_grad)
        alone.setdefault("ids", []).append(int(batch.image_ids[0]))
        return {"loss": total * float(batch.image_ids[0])}

    monkeypatch.setattr(Detector, "forward", known)
    settings = ("data.batch_per_device=1", "training.accumulate=2", "optimizer.clip=null")
    found = gradients_of_first_step(data, tmp_path / "run", monkeypatch, *settings)
    first, second = alone["ids"]
    assert first != second
    for gradient in found.values():
        torch.testing.assert_close(gradient, torch.full_like(gradient, (first + second) / 2))


def test_average_of_the_weights(
    data: DataSplits,
    tmp_path: Path,
    stop_at: Callable[[int], None],
    reference: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """a_1 = w_1 and a_t = d a_(t-1) + (1 - d) w_t; the average is what is saved and evaluated, w what goes on."""
    out = tmp_path / "run"
    decay, weights, step = 0.6, [], Run.train_step

    def watched(self: Run, batches: Iterator[Any]) -> None:
        step(self, batches)
        weights.append({key: value.clone() for key, value in self.detector.state_dict().items()})

    with monkeypatch.context() as patch:
        patch.setattr(Run, "train_step", watched)
        stop_at(3)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(f"training.ema={decay}"), data, out, show=False)
    tensors = load_file(out / "trainer.safetensors")
    kept = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    assert kept.keys() == weights[2].keys()
    assert all(torch.equal(kept[key], value) for key, value in weights[2].items())
    saved = load_file(out / "last.safetensors")
    trained = [key for key in saved if not torch.equal(weights[0][key], weights[2][key]) and key.endswith("weight")]
    assert trained == [key for key in saved if key.endswith("weight")]
    for key in trained:
        one, two, three = (w[key].double() for w in weights)
        expected = decay * (decay * one + (1 - decay) * two) + (1 - decay) * three
        torch.testing.assert_close(saved[key].double(), expected, rtol=1e-5, atol=1e-8)
        assert not torch.equal(saved[key], weights[2][key])
    # The average does not touch the training itself, and a resumed run goes on averaging.
    stop_at(-1)
    train(tiny(f"training.ema={decay}"), data, out, resume=True, show=False)
    ours, theirs = load_file(out / "trainer.safetensors"), load_file(reference / "trainer.safetensors")
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    average = load_file(out / "last.safetensors")
    assert all(torch.equal(ours[f"average.module.{key}"], value) for key, value in average.items())


def test_saved_average_is_what_was_evaluated(data: DataSplits, tmp_path: Path) -> None:
    from tailseg.evaluation.evaluate import evaluate
    from tailseg.predict import load

    recipe = tiny("training.ema=0.9")
    scores = train(recipe, data, tmp_path / "run", show=False)
    assert scores is not None
    model = load(tmp_path / "run" / "last.safetensors", "cpu")
    dataset = evaluation_dataset(data.val, recipe.data)
    again = evaluate(model.detector, dataset, tmp_path / "again", device=model.device, batch_size=2, show=False)
    assert again is not None
    assert again.metrics == scores.metrics


def test_best_is_the_best(data: DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tailseg.checkpoint import load_model
    from tailseg.evaluation.metrics import Scores
    from tailseg.model.detector import Detector
    from tailseg.training import evaluations

    values = iter([0.2, 0.5, 0.5, None])

    def scored(*_: Any, **__: Any) -> Scores:
        value = next(values)
        return Scores(metrics={"bbox": {}, "segm": {"AP": value, "APr": None}}, per_category=[])

    monkeypatch.setattr(evaluations, "evaluate", scored)
    monkeypatch.setattr(Detector, "forward", lambda self, _: weights_alone(self))
    train(tiny("schedule.epochs=4", "schedule.milestones=[]"), data, tmp_path / "run", show=False)
    best, last = (load_model(tmp_path / "run" / f"{name}.safetensors") for name in ("best", "last"))
    assert (best.step, last.step) == (2 * STEPS, 4 * STEPS)
    assert best.metrics == {"bbox": {}, "segm": {"AP": 0.5, "APr": None}}
    assert last.metrics is None  # it is saved before it is evaluated
    assert [c.name for c in best.categories] == [c.name for c in data.val.categories]  # type: ignore[union-attr]
    assert best.recipe == last.recipe


# ---------------------------------------------------------------------------------------------------------
# A run saves before it evaluates


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Evaluations give these, one after the other, in place of real scores."""
    from tailseg.evaluation.metrics import Scores
    from tailseg.training import evaluations

    values: list[float] = []

    def evaluate(*_: Any, **__: Any) -> Scores:
        return Scores(metrics={"bbox": {}, "segm": {"AP": values.pop(0), "APr": None}}, per_category=[])

    monkeypatch.setattr(evaluations, "evaluate", evaluate)
    return values


def test_stopped_early_and_then_with_more_patience(
    data: DataSplits, tmp_path: Path, scored: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    out, settings = tmp_path / "run", ("schedule.epochs=6", "training.patience=2")
    scored += [0.1, 0.3, 0.2, 0.3, 0.0, 0.0]
    train(tiny(*settings), data, out, show=False)
    assert f"Step {4 * STEPS}: stopped early, since 2 evaluations did not beat the best" in caplog.text
    assert [row["epoch"] for row in rows(out) if "metrics" in row] == [1, 2, 3, 4]
    train(tiny(*settings), data, out, resume=True, show=False)  # it is over as it was
    assert len(scored) == 2
    train(tiny("schedule.epochs=6", "training.patience=3"), data, out, resume=True, show=False)
    assert [row["epoch"] for row in rows(out) if "metrics" in row] == [1, 2, 3, 4, 5]


def test_frozen_parts_stay_as_they_were(data: DataSplits, reference: Path, tmp_path: Path) -> None:
    """From a model; batch norm of a frozen backbone keeps its statistics, though the recipe trains them."""
    frozen = tiny("training.freeze=[backbone, mask_heads]", "model.backbone.train_norm=true")
    train(frozen, data, tmp_path / "run", init=reference / "last.safetensors", show=False)
    before, after = (load_file(folder / "last.safetensors") for folder in (reference, tmp_path / "run"))
    changed = {".".join(key.split(".")[:3]) for key in before if not torch.equal(before[key], after[key])}
    assert not [key for key in changed if key.startswith("backbone.") or ".mask_head" in key]
    assert {"stages.0.box_head"} <= changed
    assert any(key.startswith("rpn.") for key in changed)
    with pytest.raises(UserError, match=r"training.freeze: rpn would stay at random weights"):
        train(tiny("training.freeze=[rpn]"), data, tmp_path / "other", show=False)


def test_every_step_is_made_in_the_modes_of_training(
    data: DataSplits, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though an evaluation leaves the model in that of evaluation."""
    from tailseg.evaluation.metrics import Scores
    from tailseg.model.detector import Detector
    from tailseg.training import evaluations

    def evaluate(detector: Detector, *_: Any, **__: Any) -> Scores:
        detector.eval()
        return Scores(metrics={"bbox": {}, "segm": {"AP": 0.1, "APr": None}}, per_category=[])

    modes: list[dict[str, bool]] = []

    def learn(self: Detector, _: Any) -> dict[str, torch.Tensor]:
        modes.append({name: module.training for name, module in self.named_modules()})
        return weights_alone(self)

    monkeypatch.setattr(evaluations, "evaluate", evaluate)
    monkeypatch.setattr(Detector, "forward", learn)
    settings = ("schedule.epochs=2", "training.freeze=[mask_heads]")
    train(tiny(*settings), data, tmp_path / "run", init=reference / "last.safetensors", show=False)
    assert len(modes) == 2 * STEPS
    assert all(mode == modes[0] for mode in modes)
    assert modes[0]["stages.0.box_head"]
    assert not modes[0]["stages.0.mask_head"]
    assert {mode for name, mode in modes[0].items() if name.startswith("backbone.")} == {True, False}


def test_a_cosine_with_more_epochs_is_another_run(
    data: DataSplits, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cosine = ("schedule={kind: cosine, milestones: [], warmup_steps: 0, epochs: 1}", "training.log_steps=1")
    train(tiny(*cosine), data, tmp_path / "run", show=False)
    rates = [row["lr"] for row in rows(tmp_path / "run") if "lr" in row]
    assert rates == pytest.approx([rates[0] * (1 + math.cos(math.pi * step / STEPS)) / 2 for step in range(STEPS)])
    train(tiny(*cosine, "schedule.epochs=2"), data, tmp_path / "run", resume=True, show=False)
    assert "goes on with schedule.epochs = 2 instead of 1: no longer the run that it began as" in caplog.text


def test_images_without_objects_are_trained_on_as_background(data: DataSplits, tmp_path: Path) -> None:
    """Also where a batch holds nothing else, in which only background and no box or mask has a loss."""
    assert data.train is not None
    folder = tmp_path / "data"
    shutil.copytree(data.train.path.parent, folder)
    content = json.loads((folder / "train.json").read_text())
    empty = {row["id"] for row in content["images"][:4]}
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] not in empty]
    (folder / "train.json").write_text(json.dumps(content))
    settings = ("data.keep_empty=true", "data.batch_per_device=1", "training.log_steps=1", "schedule.milestones=[]")
    train(tiny(*settings), open_data(str(folder)), tmp_path / "run", show=False)
    losses = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in losses] == list(range(1, IMAGES + 1))
    assert all(math.isfinite(row["loss"]) for row in losses)
    assert sum(row["mask"] == 0 and row["box"] == 0 for row in losses) == len(empty)


RESULTS = ("metrics.json", "detections.json", "classes.csv", "recipe.yaml")


def header(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return {key: json.loads(value) for key, value in file.metadata().items()}


def assert_same_files(out: Path, reference: Path) -> None:
    """Equal files, but for the speed in the log."""
    assert {path.name for path in out.iterdir()} == {path.name for path in reference.iterdir()}
    assert [name for name in RESULTS if (out / name).read_bytes() != (reference / name).read_bytes()] == []
    for name in ("best.safetensors", "last.safetensors", "trainer.safetensors"):
        assert differing(out, reference, name) == []
        assert header(out / name) == header(reference / name)
    ours, theirs = ([row | {"images_per_second": 0} for row in rows(folder)] for folder in (out, reference))
    assert ours == theirs


def stopped_in(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """The first evaluation is killed in its middle, before it saves the best model, or before it is logged."""
    from tailseg.training import evaluations

    def killed(*_: Any, **__: Any) -> None:
        raise SystemExit("killed")

    save, write = Run._save_model, RunLog.write
    if place == "evaluate":
        monkeypatch.setattr(evaluations, "evaluate", killed)
    elif place == "best":
        monkeypatch.setattr(
            Run, "_save_model", lambda self, name, *a: killed() if name.startswith("best") else save(self, name, *a)
        )
    else:
        monkeypatch.setattr(RunLog, "write", lambda self, row: killed() if "metrics" in row else write(self, row))


@pytest.mark.parametrize("place", ["evaluate", "best", "log"])
def test_a_kill_while_it_evaluates_loses_nothing(
    data: DataSplits, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stopped_in(patch, place)
        with pytest.raises(SystemExit):
            train(tiny(), data, out, show=False)
    assert load_file(out / "trainer.safetensors")
    assert differing(out, reference) == []
    assert [row for row in rows(out) if "metrics" in row] == []
    scores = train(tiny(), data, out, resume=True, show=False)
    assert scores is not None
    assert scores.metrics == json.loads((reference / "metrics.json").read_text())
    assert_same_files(out, reference)
    assert train(tiny(), data, out, resume=True, show=False) == scores  # nothing is left to do
    assert_same_files(out, reference)


def test_a_broken_image_of_validation_costs_no_training(
    data: DataSplits, reference: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The file was cut off while the run trained."""
    assert data.val is not None
    folder = tmp_path / "images"
    shutil.copytree(data.val.images_dir, folder)
    moved = replace(data, val=replace(data.val, images_dir=folder))
    path = moved.val.image_path(1)  # type: ignore[union-attr]
    sound = path.read_bytes()
    path.write_bytes(sound[: len(sound) // 2])
    out = tmp_path / "run"
    assert train(tiny(), moved, out, show=False) is None
    (said,) = [message for message in caplog.messages if "failed" in message]
    assert said.startswith(f"Epoch 1: the evaluation failed ({path}: the image is broken or cut off")
    assert said.endswith(f"the model is in {out / 'last.safetensors'}, to be scored with `tailseg eval`.")
    assert differing(out, reference) == []
    path.write_bytes(sound)
    train(tiny(), moved, out, resume=True, show=False)  # makes up for the evaluation
    assert_same_files(out, reference)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), KeyError("segm")])
def test_an_evaluation_that_fails_costs_no_training(
    data: DataSplits,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    from tailseg.training import evaluations

    whole, calls = evaluations.evaluate, []

    def fails_once(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise error
        return whole(*args, **options)

    monkeypatch.setattr(evaluations, "evaluate", fails_once)
    out = tmp_path / "run"
    scores = train(tiny("schedule.epochs=2"), data, out, show=False)
    assert scores is not None
    assert f"Epoch 1: the evaluation failed ({type(error).__name__}: {error}); nothing is lost" in caplog.text
    assert [row["epoch"] for row in rows(out) if "metrics" in row] == [2]
    assert load_file(out / "best.safetensors").keys() == load_file(reference / "best.safetensors").keys()


def test_the_best_of_before_a_kill_stays_the_best(
    data: DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer file is older than the evaluation of its own step, whose result is in the log."""
    from tailseg.checkpoint import load_model
    from tailseg.evaluation.metrics import Scores
    from tailseg.model.detector import Detector
    from tailseg.training import evaluations

    out, values, evaluated = tmp_path / "run", iter([0.5, 0.3, None, 0.6]), []

    def scored(*_: Any, **__: Any) -> Scores:
        value = next(values)
        evaluated.append(value)
        return Scores(metrics={"bbox": {}, "segm": {"AP": value, "APr": None}}, per_category=[])

    def killed_at(step: int) -> Callable[..., None]:
        def step_or_die(self: Run, batches: Iterator[Any]) -> None:
            if self.step == step:
                raise SystemExit("killed")
            train_step(self, batches)

        return step_or_die

    train_step = Run.train_step
    monkeypatch.setattr(evaluations, "evaluate", scored)
    monkeypatch.setattr(Detector, "forward", lambda self, _: weights_alone(self))
    recipe = tiny("schedule.epochs=4", "schedule.milestones=[]")
    for kill, best in ((STEPS, STEPS), (2 * STEPS + 1, STEPS), (3 * STEPS + 2, STEPS), (-1, 4 * STEPS)):
        monkeypatch.setattr(Run, "train_step", killed_at(kill))
        if kill > 0:
            with pytest.raises(SystemExit):
                train(recipe, data, out, resume=out.exists(), show=False)
        else:
            train(recipe, data, out, resume=True, show=False)
        assert load_model(out / "best.safetensors").step == best
    assert evaluated == [0.5, 0.3, None, 0.6]  # each once
    assert [row["metrics"]["segm"]["AP"] for row in rows(out) if "metrics" in row] == evaluated


def test_validation_without_annotations(
    data: DataSplits, reference: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert data.val is not None
    content = orjson.loads(data.val.path.read_bytes()) | {"annotations": []}
    path = tmp_path / "val.json"
    path.write_bytes(orjson.dumps(content))
    bare = replace(data, val=load_annotations(path, data.val.images_dir))
    caplog.set_level("INFO", logger="tailseg")
    out = tmp_path / "run"
    assert train(tiny("schedule.epochs=2"), bare, out, show=False) is None
    names = {path.name for path in out.iterdir()}
    assert names == {"last.safetensors", "trainer.safetensors", "metrics.jsonl", "recipe.yaml"}
    said = [message for message in caplog.messages if "best.safetensors" in message]
    assert said == [f"{path}: has no annotations, so the run is not evaluated: no best.safetensors."]
    assert [row["step"] for row in rows(out)] == [STEPS, 2 * STEPS]


def test_divergence_is_told_before_it_is_saved(
    data: DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tailseg.model.detector import Detector

    forward, out = Detector.forward, tmp_path / "run"

    def diverges(self: Detector, batch: Any) -> dict[str, Tensor]:
        losses = forward(self, batch)
        return {**losses, "box": losses["box"] * math.nan}

    monkeypatch.setattr(Detector, "forward", diverges)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_, **__: None)  # so that only the loss shows it
    with pytest.raises(UserError, match=r"^step 4: the loss 'box' is nan: training diverged; lower optimizer\.lr"):
        train(tiny("training.save_steps=4", "training.log_steps=1000"), data, out, show=False)
    assert not (out / "trainer.safetensors").exists()


def test_divergence_that_breaks_the_model(data: DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^step \d: .* training diverged; lower optimizer\.lr \(now 1e\+12\)"):
        train(tiny("optimizer.lr=1e12", "optimizer.clip=null"), data, tmp_path / "run", show=False)
    from tailseg.model.detector import Detector

    def faulty(self: Detector, batch: Any) -> dict[str, Tensor]:
        raise RuntimeError("of ours")

    monkeypatch.setattr(Detector, "forward", faulty)
    with pytest.raises(RuntimeError, match="of ours"):  # with sound weights an error keeps its traceback
        train(tiny(), data, tmp_path / "other", show=False)


def test_one_image_is_too_few_for_batch_norm_over_one_value(data: DataSplits, tmp_path: Path) -> None:
    """Split attention normalises one value an image."""
    backbone = "model.backbone={name: resnest14d, train_norm: true, options: {channels: [8, 8, 8, 8], stem_width: 4}}"
    with pytest.raises(UserError, match=r"^data\.batch_per_device = 1: .* set data\.batch_per_device=2"):
        train(tiny(backbone, "data.batch_per_device=1"), data, tmp_path / "run", show=False)


def test_resuming_needs_the_same_run(data: DataSplits, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(reference, out)
    with pytest.raises(UserError, match=r"run: already holds a run; add --resume"):
        train(tiny(), data, out, show=False)
    with pytest.raises(UserError, match=r"empty: holds no trainer\.safetensors"):
        train(tiny(), data, tmp_path / "empty", resume=True, show=False)
    for settings, seed, named in (
        ((), 1, "cannot resume with seed 1, the run began with 0"),
        (("optimizer.weight_decay=0.5",), 0, r"cannot resume with optimizer\.weight_decay = 0\.5, the run began with"),
        (("data.flip=0",), 0, r"cannot resume with data\.flip = 0"),
        (("training.ema=0.5",), 0, r"cannot resume with training\.ema = 0\.5, the run began with None; set it back or"),
        (("model.neck.channels=8",), 0, r"cannot resume with model\.neck\.channels = 8, the run began with 16; set it"),
    ):
        with pytest.raises(UserError, match=named):
            train(tiny(*settings), data, out, resume=True, seed=seed, show=False)
    renamed = orjson.loads(data.train.path.read_bytes())  # type: ignore[union-attr]
    renamed["categories"][0]["name"] = "zebra"
    other = tmp_path / "other"
    other.mkdir()
    for split in ("train", "val"):
        (other / f"{split}.json").write_bytes(orjson.dumps({**renamed}))
    (other / "images").symlink_to(data.train.images_dir)  # type: ignore[union-attr]
    with pytest.raises(UserError, match="other categories"):
        train(tiny(), open_data(str(other)), out, resume=True, show=False)
    assert differing(out, reference, "trainer.safetensors") == []


# ---------------------------------------------------------------------------------------------------------
# Advice that works: what a message says is then done to the letter


def diverging_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    from tailseg.model.detector import Detector

    forward, calls = Detector.forward, []

    def diverges(self: Detector, batch: Any) -> dict[str, Tensor]:
        calls.append(1)
        losses = forward(self, batch)
        return losses if len(calls) <= steps else {**losses, "box": losses["box"] * math.nan}

    monkeypatch.setattr(Detector, "forward", diverges)


@pytest.mark.parametrize("setting", ["optimizer.lr=0.0005", "optimizer.clip=1"])
def test_divergence_then_resumed_as_advised(
    data: DataSplits,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    setting: str,
) -> None:
    out, settings = tmp_path / "run", ("training.save_steps=2", "training.log_steps=2")
    with monkeypatch.context() as patch:
        diverging_after(patch, 2)
        with pytest.raises(
            UserError,
            match=r"^step 4: the loss '\w+' is nan: training diverged; lower optimizer\.lr \(now 0\.001\) or set "
            r"optimizer\.clip, then go on with --resume$",
        ):
            train(tiny(*settings), data, out, show=False)
    assert train(tiny(*settings, setting), data, out, resume=True, show=False) is not None
    key, value = setting.split("=")
    assert f"goes on with {key} = {float(value)} instead of" in caplog.text
    assert [row["step"] for row in rows(out) if "loss" in row] == [2, 4, 6]


def test_the_best_model_of_an_earlier_run_is_not_taken_over_then_as_advised(
    data: DataSplits, reference: Path, tmp_path: Path
) -> None:
    """Its trainer file was removed, to save disk."""
    out = tmp_path / "run"
    shutil.copytree(reference, out)
    (out / "trainer.safetensors").unlink()
    best = out / "best.safetensors"
    with pytest.raises(UserError) as refused:
        train(tiny(), data, out, seed=1, show=False)
    assert str(refused.value) == (
        f"{best}: is of an earlier run; move it elsewhere to start a new one here, or choose another --out"
    )
    for name in ("best.safetensors", "last.safetensors", "metrics.jsonl", "metrics.json", "recipe.yaml"):
        assert (out / name).read_bytes() == (reference / name).read_bytes()
    best.rename(tmp_path / "kept.safetensors")
    assert train(tiny(), data, out, seed=1, show=False) is not None
    assert {row["step"] for row in rows(out)} == {STEPS}
    assert len(differing(out, reference)) > 0


@pytest.mark.parametrize("left", [None, b"damaged", "best.safetensors"])
def test_the_last_model_of_a_finished_run_is_written_again(
    data: DataSplits, reference: Path, tmp_path: Path, left: bytes | str | None
) -> None:
    out = tmp_path / "run"
    shutil.copytree(reference, out)
    last = out / "last.safetensors"
    last.unlink()
    if isinstance(left, bytes):
        last.write_bytes(left)
    elif left is not None:  # a sound model, of another step
        tensors, about = read_tensors(out / left)
        write_tensors(last, tensors, about | {"step": 3})
    assert train(tiny(), data, out, resume=True, show=False) is not None
    assert_same_files(out, reference)


@pytest.mark.parametrize("older", [False, True])
def test_a_checkpoint_that_had_diverged_then_started_again_as_advised(
    data: DataSplits, reference: Path, tmp_path: Path, older: bool
) -> None:
    """A step so large that the next loss is not finite, saved before that was seen; the best model may be older."""
    out, settings = tmp_path / "run", ("training.save_steps=1", "optimizer.clip=null", "schedule.warmup_steps=0")
    wild = tiny(*settings, "optimizer={name: sgd, lr: 100000.0}")
    with pytest.raises(UserError, match=r"^step 2: .* training diverged; lower optimizer\.lr .*go on with --resume$"):
        train(wild, data, out, show=False)
    best = out / "best.safetensors"
    if older:
        tensors, about = read_tensors(reference / best.name)
        write_tensors(best, tensors, about | {"step": 0})
    else:
        shutil.copy(reference / best.name, best)  # of step 6, after the checkpoint
    for setting in ("optimizer.lr=1e-3", "optimizer.clip=0.1"):
        calmed = override(wild, [setting])
        with pytest.raises(UserError) as refused:
            train(calmed, data, out, resume=True, show=False)
        advice = re.fullmatch(
            r"step 2: the loss '\w+' is \w+, and was not finite as soon as the run was resumed: the weights saved at "
            r"step 1 have diverged; start again with another --out(.*), and no --resume, with a lower optimizer\.lr "
            r"than they were trained with, or optimizer\.clip set",
            str(refused.value),
        )
        assert advice is not None, refused.value
        assert advice[1] == (f" and --init {best}" if older else "")
    again = train(tiny(*settings), data, tmp_path / "another", init=best if older else None, show=False)
    assert again is not None


def test_divergence_before_the_first_checkpoint_then_started_again(
    data: DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        diverging_after(patch, 0)
        with pytest.raises(UserError, match=r"or set optimizer\.clip, then start again: nothing was saved yet$"):
            train(tiny("training.log_steps=1"), data, out, show=False)
    assert train(tiny("training.log_steps=1", "optimizer.lr=0.0005"), data, out, show=False) is not None
    assert [row["step"] for row in rows(out) if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_out_of_memory_then_resumed_as_advised(
    data: DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tailseg.model.detector import Detector

    out, forward, steps = tmp_path / "run", Detector.forward, []

    def full(self: Detector, batch: Any) -> dict[str, Tensor]:
        steps.append(1)
        if len(steps) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return forward(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Detector, "forward", full)
        with pytest.raises(
            UserError,
            match=r"run: step 4 does not fit into the memory of the GPU; free it of other programs or set "
            r"data\.batch_per_device=1 and training\.accumulate=2, then go on with --resume$",
        ):
            train(tiny(), data, out, show=False)
    assert read_trainer(out / "trainer.safetensors")[1]["step"] == 3  # nothing is lost
    advised = ("data.batch_per_device=1", "training.accumulate=2")
    assert train(tiny(*advised), data, out, resume=True, show=False) is not None
    assert [row["step"] for row in rows(out) if "metrics" in row] == [STEPS]


def test_a_finished_run_says_so_and_goes_on_with_more_epochs(
    data: DataSplits, reference: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    shutil.copytree(reference, out)
    scores = train(tiny(), data, out, resume=True, show=False)
    assert scores is not None
    assert scores.metrics == json.loads((out / "metrics.json").read_text())
    assert data.train is not None
    assert [row["name"] for row in scores.per_category] == [category.name for category in data.train.categories]
    assert (
        f"{out}: the run is finished: 6 steps of 6, 1 epochs; for more, --resume with a larger schedule.epochs."
        in caplog.messages
    )
    caplog.clear()
    assert train(tiny("schedule.epochs=2"), data, out, resume=True, show=False) is not None
    assert "finished" not in caplog.text
    assert rows(out)[-1]["step"] == 2 * STEPS


def test_other_data_is_refused_then_started_from_as_advised(data: DataSplits, reference: Path, tmp_path: Path) -> None:
    assert data.train is not None
    out, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(reference, out)
    other.mkdir()
    content = orjson.loads(data.train.path.read_bytes())
    dropped = content["images"].pop()["id"]
    left = [row for row in content["annotations"] if row["image_id"] != dropped]
    before, content["annotations"] = len(content["annotations"]), left
    (other / "train.json").write_bytes(orjson.dumps(content))
    shutil.copy(data.train.path.with_name("val.json"), other)
    (other / "images").symlink_to(data.train.images_dir)
    fewer = open_data(str(other))
    with pytest.raises(UserError) as refused:
        train(tiny(), fewer, out, resume=True, show=False)
    assert str(refused.value) == (
        f"{out}: the train split had 12 images with {before} objects when the run began, and has 11 images with "
        f"{len(left)} objects now; go on with the data of before, or train on the new with "
        f"--init {out / 'last.safetensors'}, another --out and no --resume"
    )
    assert train(tiny(), data, out, resume=True, show=False) is not None
    again = train(tiny(), fewer, tmp_path / "again", init=out / "last.safetensors", show=False)
    assert again is not None
    # Moved to another folder it is the same data.
    shutil.copy(data.train.path, other)
    assert train(tiny(), open_data(str(other)), out, resume=True, show=False) is not None


@pytest.mark.parametrize("damage", ["cut", "byte", "text"])
def test_a_damaged_trainer_file_then_as_advised(data: DataSplits, reference: Path, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "run"
    shutil.copytree(reference, out)
    trainer, best = out / "trainer.safetensors", out / "best.safetensors"
    sound = trainer.read_bytes()
    damaged = {"cut": sound[: len(sound) // 2], "byte": sound[:-9] + bytes([sound[-9] ^ 1]) + sound[-8:], "text": b"x"}
    trainer.write_bytes(damaged[damage])
    sentence = f"{trainer}: is damaged or was edited; start again with another --out{{}}, and no --resume"
    with pytest.raises(UserError) as refused:
        train(tiny(), data, out, resume=True, show=False)
    assert str(refused.value) == sentence.format(f" and --init {best}")
    best.write_bytes(damaged["text"])  # such a model is not advised
    with pytest.raises(UserError) as refused:
        train(tiny(), data, out, resume=True, show=False)
    assert str(refused.value) == sentence.format("")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_trainer_file_with_what_is_not_finite_then_as_advised(
    data: DataSplits, reference: Path, tmp_path: Path, value: float
) -> None:
    out, name = tmp_path / "run", "model.rpn.conv.weight"
    shutil.copytree(reference, out)
    trainer, best = out / "trainer.safetensors", out / "best.safetensors"
    tensors, about = read_tensors(trainer)
    tensors[name][0, 0, 0, 0] = value
    write_tensors(trainer, tensors, about)
    spoilt = (
        f"{trainer}: '{name}' holds values that are not finite: the model had diverged, or the file is damaged; start "
        "again with another --out{}, and no --resume"
    )
    with pytest.raises(UserError) as refused:
        train(tiny("schedule.epochs=2"), data, out, resume=True, show=False)
    assert str(refused.value) == spoilt.format(f" and --init {best}")
    assert train(tiny(), data, tmp_path / "another", init=best, show=False) is not None
    best.unlink()
    with pytest.raises(UserError) as refused:
        train(tiny("schedule.epochs=2"), data, out, resume=True, show=False)
    assert str(refused.value) == spoilt.format("")


def test_the_images_of_a_step_shared_out_otherwise(
    data: DataSplits,
    tmp_path: Path,
    stop_at: Callable[[int], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "run"
    stop_at(2)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), data, out, show=False)
    stop_at(-1)
    with pytest.raises(UserError, match=r"which is 1 images a step, .* so that the product is 2$"):
        train(tiny("data.batch_per_device=1"), data, out, resume=True, show=False)
    shared = tiny("data.batch_per_device=1", "training.accumulate=2")
    assert train(shared, data, out, resume=True, show=False) is not None
    assert "as many images a step, but the rest of the run is no longer the same to the bit" in caplog.text
    assert rows(out)[-1]["step"] == STEPS


def test_a_step_of_more_than_an_epoch_then_as_advised(
    data: DataSplits, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UserError, match=r"an epoch of 12 images has 6; set training\.accumulate=6 or less$"):
        train(tiny("training.accumulate=50"), data, tmp_path / "run", show=False)
    train(tiny("training.accumulate=6"), data, tmp_path / "run", show=False)
    assert "The warm-up of 4 steps is no shorter than the run of 1" in caplog.text


# ---------------------------------------------------------------------------------------------------------
# One training a folder, and what a killed one leaves there


def test_two_trainings_in_one_folder(data: DataSplits, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(reference, out)
    with run_lock(out), pytest.raises(UserError, match=rf"^{out}: process {os.getpid()} on \S+ is training in"):
        train(tiny("schedule.epochs=2"), data, out, resume=True, show=False)
    assert differing(out, reference, "trainer.safetensors") == []
    assert train(tiny(), data, out, resume=True, show=False) is not None
    assert not (out / ".lock").exists()


def test_unfinished_files_go_at_the_next_start(data: DataSplits, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(reference, out)
    for name in (".trainer.safetensors.77.part", ".metrics.jsonl.part", ".detections.0.json"):
        (out / name).write_text("half")
    train(tiny(), data, out, resume=True, show=False)
    assert_same_files(out, reference)


# ---------------------------------------------------------------------------------------------------------
# A loader process that the system kills


@pytest.mark.parametrize("during", ["a step", "loading"])
def test_a_killed_loader_process(
    data: DataSplits, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, during: str
) -> None:
    """Also where it dies in the middle of a step: the step is completed and saved."""
    out, step = tmp_path / "run", torch.optim.AdamW.step
    steps: list[int] = []

    def kills(self: torch.optim.Optimizer, *args: Any, **options: Any) -> Any:
        result = step(self, *args, **options)
        steps.append(1)
        if len(steps) == 3:
            kill_loaders()
        return result

    def kill_loaders() -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)  # type: ignore[arg-type]
        if during == "a step":
            time.sleep(0.2)  # the signal comes here

    monkeypatch.setattr(torch.optim.AdamW, "step", kills)
    with pytest.raises(UserError) as refused:
        train(tiny("data.workers=2"), data, out, show=False)
    assert str(refused.value) == (
        "a loader process was killed, most often since memory or shared memory (/dev/shm) ran out; lower data.workers, "
        "and in Docker raise --shm-size, such as --shm-size=8g; then go on with --resume"
    )
    with safe_open(out / "trainer.safetensors", framework="pt") as file:
        assert int(file.metadata()["step"]) >= 3
    train(tiny("data.workers=1"), data, out, resume=True, show=False)
    assert differing(out, reference, "trainer.safetensors") == []


def test_a_killed_loader_process_in_the_middle_of_an_accumulated_step(
    data: DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step before is saved, without what the forward passes of the broken one had counted."""
    from tailseg.losses.seesaw import SeesawLoss

    settings = ("data.batch_per_device=1", "training.accumulate=2", "training.log_steps=1")
    out, count, calls = tmp_path / "run", SeesawLoss._add, []
    train(tiny(*settings), data, tmp_path / "whole", show=False)

    def kills(self: SeesawLoss, *arguments: Any, **options: Any) -> None:
        count(self, *arguments, **options)
        calls.append(self.counts.sum().item())
        if len(calls) == 5:  # the first of the two batches of step 3
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)  # type: ignore[arg-type]
            time.sleep(0.2)

    with monkeypatch.context() as patch:
        patch.setattr(SeesawLoss, "_add", kills)
        with pytest.raises(UserError, match=r"^a loader process was killed, .*; then go on with --resume$"):
            train(tiny(*settings, "data.workers=2"), data, out, show=False)
    assert len(calls) == 5
    assert calls[3] < calls[4]
    tensors = load_file(out / "trainer.safetensors")
    assert sum(value.sum().item() for key, value in tensors.items() if key.endswith(".counts")) == calls[3]
    assert header(out / "trainer.safetensors")["step"] == 2
    train(tiny(*settings), data, out, resume=True, show=False)
    assert_same_files(out, tmp_path / "whole")


def test_a_loader_process_killed_in_the_first_step_leaves_nothing_to_resume(
    data: DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tailseg.model.detector import Detector

    def kills(self: Detector, _: Any) -> dict[str, Tensor]:
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)  # type: ignore[arg-type]
        time.sleep(0.2)
        return weights_alone(self)

    settings = ("data.batch_per_device=1", "training.accumulate=2", "data.workers=1")
    with monkeypatch.context() as patch:
        patch.setattr(Detector, "forward", kills)
        with pytest.raises(UserError, match=r"; then start again: nothing was saved yet$"):
            train(tiny(*settings), data, tmp_path / "run", show=False)
    assert train(tiny(*settings), data, tmp_path / "run", show=False) is not None


def test_class_statistics_are_those_of_the_training_file(data: DataSplits) -> None:
    assert data.train is not None
    found = class_statistics(data.train)
    file = json.loads(data.train.path.read_text())
    rows = sorted(file["categories"], key=lambda row: row["id"])
    assert found.num_images == len({row["image_id"] for row in file["annotations"]}) == IMAGES
    assert found.images.tolist() == [row["image_count"] for row in rows]
    assert found.instances.tolist() == [row["instance_count"] for row in rows]


def test_a_loss_that_needs_them_gets_the_statistics(data: DataSplits, tmp_path: Path) -> None:
    settings = ("classifier.loss=eql", "classifier.threshold=0.5", "schedule.epochs=1")
    train(tiny(*settings), data, tmp_path / "run", show=False)
    state = load_file(tmp_path / "run" / "last.safetensors")
    assert data.train is not None
    share = class_statistics(data.train).images / IMAGES
    assert state["stages.0.box_head.classification.spared"].tolist() == (share < 0.5).float().tolist()


def test_shares_are_over_all_images_that_are_trained_on(data: DataSplits, tmp_path: Path) -> None:
    """With data.keep_empty, also over those without annotations."""
    assert data.train is not None
    content = json.loads(data.train.path.read_text())
    content["images"] += [content["images"][0] | {"id": 1000 + i} for i in range(2 * IMAGES)]
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.json").write_text(json.dumps(content))
    shutil.copy(data.train.path.with_name("val.json"), folder)
    (folder / "images").symlink_to(data.train.images_dir)
    splits = open_data(str(folder))
    assert splits.train is not None
    assert class_statistics(splits.train).num_images == IMAGES
    assert class_statistics(splits.train, keep_empty=True).num_images == 3 * IMAGES
    share = class_statistics(splits.train).images / IMAGES
    threshold = float(share.max()) / 2
    for keep, expected in (("false", share < threshold), ("true", share / 3 < threshold)):
        settings = ("classifier.loss=eql", f"classifier.threshold={threshold}", f"data.keep_empty={keep}")
        run = Run(launch(1), tiny(*settings), splits, tmp_path / "run", 0)
        spared = run.detector.state_dict()["stages.0.box_head.classification.spared"]
        assert spared.tolist() == expected.float().tolist()
    assert expected.all()


def test_data_sets(data: DataSplits) -> None:
    recipe = tiny("data.flip=1").data
    ours, whole, bare = (
        train_dataset(data.train, recipe),
        evaluation_dataset(data.val, recipe),
        evaluation_dataset(data.train, recipe),
    )
    assert (len(ours), len(whole), len(bare)) == (IMAGES, 4, IMAGES)
    mirrored, straight = ours[0, 0], train_dataset(data.train, tiny("data.flip=0").data)[0, 0]
    assert torch.equal(mirrored.image, straight.image.flip(2))
    assert torch.equal(mirrored.instances.boxes[:, 0], 64 - straight.instances.boxes[:, 2])
    assert torch.equal(bare[0, 0].image, straight.image)


def test_evaluation_touches_no_ground_truth(data: DataSplits, monkeypatch: pytest.MonkeyPatch) -> None:
    """No annotation is looked up and no mask painted for the images that a model detects in."""
    for name in ("rows", "absent", "segmentation"):
        monkeypatch.setattr(Annotations, name, None)
    sample = evaluation_dataset(data.val, tiny().data)[0, 0]
    assert len(sample.instances) == 0
    assert not sample.absent.any()


def test_bf16_trains_close_to_fp32(data: DataSplits, reference: Path, tmp_path: Path) -> None:
    """The loss of the first steps is that of float32 to the precision of bfloat16; boxes are not converted."""
    train(tiny("training.precision=bf16"), data, tmp_path / "run", show=False)
    ours = [row["loss"] for row in rows(tmp_path / "run") if "loss" in row]
    theirs = [row["loss"] for row in rows(reference) if "loss" in row]
    assert ours[0] == pytest.approx(theirs[0], rel=0.02)
    assert all(torch.isfinite(value).all() for value in load_file(tmp_path / "run" / "last.safetensors").values())


def test_a_fault_in_the_loop_leaves_no_worker_behind(
    data: DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tailseg.model.detector import Detector

    def fails(self: Detector, batch: Any) -> dict[str, Tensor]:
        raise ArithmeticError("planted")

    monkeypatch.setattr(Detector, "forward", fails)
    with pytest.raises(ArithmeticError, match="planted"):
        train(tiny("data.workers=2"), data, tmp_path / "run", show=False)
    assert multiprocessing.active_children() == []
