"""Second branches on a frozen model: what stays, what learns and from what, and that a cache changes no bit of it."""

import errno
import json
import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import COMMAND, assert_refused, options, run_together, tailseg
from torch import Tensor, nn
from torch.nn import functional as F

from tailseg.checkpoint import load_model, save_model
from tailseg.data.batches import collate
from tailseg.data.dataset import DetectionDataset
from tailseg.data.sources import DataSplits, open_data
from tailseg.data.synthetic.generate import SyntheticSettings, write_synthetic
from tailseg.errors import UserError
from tailseg.model.box_head import BoxHead, BoxPrediction
from tailseg.model.build import build_detector
from tailseg.model.detector import Detector
from tailseg.model.tsd import TsdBoxHead
from tailseg.predict import load
from tailseg.recipes.resolve import resolve
from tailseg.recipes.schema import Recipe
from tailseg.training import feature_cache, finetune
from tailseg.training.distributed import launch
from tailseg.training.feature_cache import (
    FeatureCache,
    digest_of_annotations,
    digest_of_tensors,
    readable,
    require_room,
)
from tailseg.training.finetune import Branches, BranchInputs, ClassInputs, Finetuning, Frozen, join
from tailseg.training.loop import Run, train
from tailseg.training.weight_init import start_from

CLASSES, IMAGES = 4, 10
TINY = (
    "model.backbone={name: resnet18, pretrained: false, frozen_stages: -1, options: {channels: [8, 16, 24, 32]}}",
    "model.neck.channels=8",
    "model.rpn={pre_nms_train: 50, pre_nms_test: 50, post_nms_train: 40, post_nms_test: 20}",
    "model.box_head={width: 16, rois: 24, max_positive: 8}",
    "model.mask_head={channels: 8, convs: 1}",
    "model.tsd.shift_width=8",
    "model.mask_iou={channels: 8, width: 16}",
    "data={batch_per_device: 2, workers: 0, short_edges: [48, 64], test_short_edge: 64, long_edge: 64, mask_grid: 28}",
    "optimizer={name: adamw, lr: 0.001, weight_decay: 0.01, clip: 10, reference_batch: 2}",
    "schedule={epochs: 1, milestones: [], warmup_steps: 2, warmup_factor: 0.1}",
    "training={evaluate_every: 9, log_steps: 1}",
    "test.max_detections=20",
)
FINETUNE = ("finetune.enabled=true", "data.sampler=repeat-factor", "data.repeat_threshold=1")
SEESAW = ("classifier.loss=seesaw", "classifier.normalized=true", "model.tsd.constrain_classes=false")
KINDS = {
    "seesaw": ("demo/seesaw", ()),
    "cross-entropy": ("demo/cross-entropy", ()),
    "seesaw-4conv1fc": ("demo/seesaw", ("model.box_head.convs=2",)),
    "cross-entropy-4conv1fc": ("demo/cross-entropy", ("model.box_head.convs=2",)),
    "row-6": ("demo-table2/06-mask-scoring", ()),  # three stages of TSD, context, learnt batch statistics
    "row-6-seesaw": ("demo-table2/06-mask-scoring", SEESAW),
}
SECOND = ".second_branch."


def recipe_of(kind: str, *settings: str) -> Recipe:
    name, own = KINDS[kind]
    return resolve(name, [*TINY, *own, *settings])


def finetuned(kind: str, *settings: str) -> Recipe:
    return recipe_of(kind, *FINETUNE, *settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = SyntheticSettings(classes=CLASSES, train_images=IMAGES, val_images=2, size=64, rarest=3)
    return write_synthetic(tmp_path_factory.mktemp("set") / "data", settings)


@pytest.fixture(scope="module")
def data(folder: Path) -> DataSplits:
    return open_data(str(folder))


Model = Callable[..., Path]


@pytest.fixture(scope="module")
def model(data: DataSplits, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A function: kind of recipe -> file of a model with random weights, batch statistics and counts of its own."""
    made: dict[tuple[str, ...], Path] = {}

    def make(kind: str, *settings: str) -> Path:
        if (kind, *settings) in made:
            return made[kind, *settings]
        assert data.train is not None
        torch.manual_seed(1)
        recipe = recipe_of(kind, *settings)
        detector = build_detector(recipe, CLASSES)
        for name, value in detector.state_dict().items():
            if name.endswith(("running_mean", "running_var")):
                value.add_(0.2 * torch.rand(value.shape))
            elif name.endswith("counts"):
                value.add_(torch.arange(len(value)) * 7 + 3)
        path = tmp_path_factory.mktemp("model") / "m.safetensors"
        save_model(path, detector, recipe, data.train.categories, step=3)
        made[kind, *settings] = path
        return path

    return make


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function: from now on runs stop after this step, as if told to by a signal."""
    return lambda step: monkeypatch.setattr(Run, "agreed", lambda self, stop: self.step == step)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def differing(one: Path, other: Path, name: str = "last.safetensors") -> list[str]:
    a, b = load_file(one / name), load_file(other / name)
    assert a.keys() == b.keys()
    return [key for key in a if bits(a[key]) != bits(b[key])]


def logged(out: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


def assert_same_run(out: Path, reference: Path) -> None:
    assert logged(out) == logged(reference)
    for name in ("last", "best", "trainer"):
        assert differing(out, reference, f"{name}.safetensors") == [], name
    assert (out / "metrics.json").read_text() == (reference / "metrics.json").read_text()


def run_of(recipe: Recipe, data: DataSplits, out: Path, init: Path) -> Run:
    run = Run(launch(1), recipe, data, out, 0, init)
    assert isinstance(run.learner, Finetuning)
    return run


# ---------------------------------------------------------------------------------------------------------
# What stays


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("seesaw", ()),
        ("seesaw-4conv1fc", ("training.accumulate=2",)),
        ("row-6-seesaw", ("training.ema=0.5", "optimizer={name: sgd, lr: 0.1, weight_decay: 0.1}")),
        ("row-6", ("training.precision=bf16", "training.ema=0.9")),
    ],
)
def test_all_but_the_branches_stays_bit_for_bit(
    data: DataSplits,
    model: Model,
    tmp_path: Path,
    kind: str,
    settings: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    step = Run.train_step

    def watched(self: Run, batches: Iterator[Any]) -> None:
        step(self, batches)
        assert isinstance(self.learner, Finetuning)
        branches = set(self.learner.branches.modules())
        assert all(m.training == (m in branches) for m in self.detector.modules())
        for name, parameter in self.detector.named_parameters():
            assert parameter.requires_grad == (SECOND in name), name
            assert parameter.grad is None, name  # of the branches, set to none after the step
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for name, p in self.detector.named_parameters() if SECOND in name}
        assert {id(p) for p in self.optimizer.state} <= held
        seen.append(self.step)

    monkeypatch.setattr(Run, "train_step", watched)
    init, out = model(kind), tmp_path / "run"
    train(finetuned(kind, *settings), data, out, init=init, show=False)
    assert len(seen) >= 3
    before, names = load_file(init), ("last.safetensors", "trainer.safetensors")
    for name in names:
        after = load_file(out / name)
        if name == "trainer.safetensors":
            parts = {key.partition(".")[0] for key in after}
            assert parts == {"model", "optimizer"} | ({"average"} if "ema" in str(settings) else set())
            after = {k.removeprefix("model."): v for k, v in after.items() if k.startswith("model.")}
        assert {key for key in after if SECOND not in key} == before.keys()
        assert [key for key in before if bits(before[key]) != bits(after[key])] == []
        branches = [key for key in after if SECOND in key]
        assert len(branches) >= 4
        for key in branches:
            assert bits(after[key]) != bits(before[origin(key, kind)]), key


def origin(key: str, kind: str) -> str:
    """The name of what a branch's tensor begins as a copy of."""
    for n in range(2):
        key = key.replace(
            f"second_branch.layers.{n}.", f"box_head.{f'class_branch.{2 * n}' if 'row-6' in kind else f'fc{n + 1}'}."
        )
    return key.replace("second_branch", "box_head")


def test_the_average_is_of_the_branches(
    data: DataSplits, model: Model, tmp_path: Path, stop_at: Callable[[int], None]
) -> None:
    """a_1 = w_1, a_2 = d a_1 + (1 - d) w_2; and the frozen tensors lie in memory once."""
    decay, weights = 0.6, []
    for step in (1, 2):
        stop_at(step)
        with pytest.raises(KeyboardInterrupt):
            train(
                finetuned("seesaw", f"training.ema={decay}"),
                data,
                tmp_path / str(step),
                init=model("seesaw"),
                show=False,
            )
        weights.append(load_file(tmp_path / str(step) / "trainer.safetensors"))
    saved = load_file(tmp_path / "2" / "last.safetensors")
    keys = [key for key in saved if SECOND in key and key.endswith("weight")]
    assert len(keys) == 3
    for key in keys:
        one, two = (w[f"model.{key}"].double() for w in weights)
        torch.testing.assert_close(saved[key].double(), decay * one + (1 - decay) * two, rtol=1e-5, atol=1e-8)
    recipe = finetuned("seesaw", "training.ema=0.5")
    run = run_of(recipe, data, tmp_path / "run", model("seesaw"))
    other = run._saved_detector()
    assert other is not run.detector
    ours, theirs = other.state_dict(keep_vars=True), run.detector.state_dict(keep_vars=True)
    assert ours.keys() == theirs.keys()
    persistent = [key for key in ours if ours[key] is not theirs[key]]
    assert persistent
    assert all(SECOND in key for key in persistent)
    assert len(persistent) == sum(SECOND in key for key in ours)


def test_the_result_is_a_model_like_any_other(data: DataSplits, model: Model, tmp_path: Path) -> None:
    """Loaded without anything more; its scores are the mean of both branches'."""
    recipe = finetuned("seesaw", "test.tta=true", "optimizer.lr=0.1")
    train(recipe, data, tmp_path / "run", init=model("seesaw"), show=False)
    saved = load_model(tmp_path / "run" / "last.safetensors")
    assert saved.recipe == recipe
    ours = load(tmp_path / "run" / "last.safetensors", "cpu")
    alone = load(model("seesaw"), "cpu").detector
    assert data.val is not None
    batch = collate([DetectionDataset(data.val, recipe_transform(recipe), drop_empty=False, mask_grid=28)[0]])
    rois = torch.tensor([[0.0, 3, 4, 40, 50], [0, 10, 10, 30, 20]])
    boxes, scores = ours.detector.predict_boxes(ours.detector.extract_features(batch), rois, batch.image_sizes)
    expected_boxes, first = alone.predict_boxes(alone.extract_features(batch), rois, batch.image_sizes)
    stage = ours.detector.stages[0]
    features = ours.detector.extract_features(batch).pool(ours.detector.box_pooler)(rois).flatten(1)
    second = stage.second_branch.classification.scores(stage.second_branch(features))[:, :-1]
    torch.testing.assert_close(boxes, expected_boxes, rtol=0, atol=0)
    torch.testing.assert_close(scores, (first + second) / 2)
    assert (first - second).abs().max() > 1e-3


def recipe_transform(recipe: Recipe) -> Any:
    from tailseg.data.transforms import fit_transform

    return fit_transform(recipe.data.test_short_edge, recipe.data.long_edge)


# ---------------------------------------------------------------------------------------------------------
# How branches start


@pytest.mark.parametrize("kind", KINDS)
def test_copies_leave_the_scores_of_the_model_as_they_are(
    data: DataSplits, model: Model, tmp_path: Path, kind: str
) -> None:
    run = run_of(finetuned(kind), data, tmp_path / "run", model(kind))
    assert run.weights_note.endswith("; second branches start as copies of its classification")
    plain = load(model(kind), "cpu").detector
    ours = run.detector.eval()
    assert isinstance(ours.stages[0].box_head, TsdBoxHead if "row-6" in kind else BoxHead)
    batch = collate([run.dataset[0], run.dataset[1]])
    with torch.no_grad():
        proposals = plain.rpn.propose(
            plain.rpn(plain.pyramid(batch.images, batch.image_sizes)), batch.image_sizes, training=plain.rpn.training
        )
        rois = torch.cat([torch.cat([torch.full((20, 1), float(i)), proposals.boxes[i]], dim=1) for i in range(2)])
        (boxes, scores), (their_boxes, their_scores) = (
            detector.predict_boxes(detector.extract_features(batch), rois, batch.image_sizes)
            for detector in (ours, plain)
        )
    assert bits(boxes) == bits(their_boxes)
    assert bits(scores) == bits(their_scores)
    assert scores.std() > 0
    for a, b in zip(ours.detect(batch), plain.detect(batch), strict=True):
        assert torch.equal(a.scores, b.scores)
        assert torch.equal(a.labels, b.labels)


def test_counts_start_at_zero_and_grow_by_the_positives(data: DataSplits, model: Model, tmp_path: Path) -> None:
    run = run_of(finetuned("row-6-seesaw"), data, tmp_path / "run", model("row-6-seesaw"))
    run.start(resume=False)
    seen: list[BranchInputs] = []

    def watched(batches: Iterator[BranchInputs]) -> Iterator[BranchInputs]:
        for inputs in batches:
            seen.append(inputs)
            yield inputs

    counts = [
        f"stages.{n}.{part}.classification.seesaw.counts" for n in range(3) for part in ("second_branch", "box_head")
    ]
    state = run.detector.state_dict()
    assert [state[key].sum().item() for key in counts] == [0, 3 + 10 + 17 + 24] * 3
    with closing(run.batches()) as batches:
        for _ in range(2):
            run.train_step(watched(batches))
    for n in range(3):
        labels = torch.cat([inputs.stages[n].labels[inputs.stages[n].valid] for inputs in seen])
        expected = torch.bincount(labels, minlength=CLASSES + 1)[:CLASSES]
        assert expected.sum() > 0
        assert torch.equal(state[counts[2 * n]], expected)
        assert torch.equal(state[counts[2 * n + 1]], torch.arange(4) * 7 + 3)


# ---------------------------------------------------------------------------------------------------------
# What they learn from


@pytest.mark.parametrize(("kind", "slots"), [("seesaw-4conv1fc", 24), ("row-6-seesaw", 24), ("row-6-seesaw", 90)])
def test_features_are_those_of_a_training_step(
    data: DataSplits, model: Model, tmp_path: Path, kind: str, slots: int
) -> None:
    """`Detector.forward`, watched at its box heads: the same proposals, RoIs drawn, boxes refined."""
    recipe = finetuned(kind, f"model.box_head.rois={slots}")
    run = run_of(recipe, data, tmp_path / "run", model(kind))
    assert isinstance(run.learner, Finetuning)
    detector = run.detector
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    sampled: list[Any] = []
    for stage in detector.stages:
        stage.sampler.register_forward_hook(lambda _module, _inputs, targets: sampled.append(targets))

        def watch(_module: nn.Module, inputs: tuple[Any, ...], prediction: BoxPrediction) -> None:
            seen.append((inputs[1], prediction.class_features, prediction.logits))

        stage.box_head.register_forward_hook(watch)
    for index in range(3):
        batch, seed = collate([run.dataset[index, 5]]), 77 + index
        found = run.learner.frozen(batch, seed)
        ours, our_targets = list(seen), list(sampled)
        seen.clear(), sampled.clear()
        loss, detector.rpn.loss = detector.rpn.loss, lambda *_: {}  # draws random numbers
        torch.manual_seed(seed)
        detector.rpn.train()
        with torch.no_grad():
            detector(batch)
        detector.rpn.eval()
        detector.rpn.loss = loss
        stages = len(recipe.model.stages)
        assert len(seen) == len(ours) == len(found.stages) == stages
        for inputs, (rois, features, _), (our_rois, _, _), targets, own in zip(
            found.stages, seen, ours, sampled, our_targets, strict=True
        ):
            assert torch.equal(rois, our_rois)
            assert torch.equal(inputs.features, features)
            assert torch.equal(inputs.labels, targets.labels)
            assert torch.equal(inputs.valid, targets.valid)
            assert torch.equal(targets.positive, own.positive)
        # Of 90 slots a later stage can not fill those of the objects, which it does not get from the one before.
        assert any(not own.valid.all() for own in found.stages) == (slots == 90)
        objects = batch.boxes.shape[1]
        assert found.stages[0].features.shape == (min(slots, 40 + objects), 8 * 49)  # of a test there would be 20
        seen.clear(), sampled.clear()


def float64_loss(branch: nn.Module, inputs: ClassInputs, counts: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """Seesaw with objectness (report, Eqs. 1 to 4) on a normalised classifier, RoI by RoI."""
    hidden = inputs.features.double()
    for n in range(len(branch.layers)):
        hidden = (hidden @ parameters[f"layers.{n}.weight"].T + parameters[f"layers.{n}.bias"]).clamp(min=0)
    weight = parameters["classifier.weight"]
    weight = weight / (weight.norm(dim=1, keepdim=True) + 1e-6)
    hidden = hidden / (hidden.norm(dim=1, keepdim=True) + 1e-6)
    logits = 20 * hidden @ weight.T + parameters["classifier.bias"]
    total = torch.zeros((), dtype=torch.float64)
    for row, label, valid in zip(logits, inputs.labels.tolist(), inputs.valid.tolist(), strict=True):
        if not valid:
            continue
        total = total - row[CLASSES:].log_softmax(0)[0 if label < CLASSES else 1]
        if label < CLASSES:
            scale = [min(1.0, max(int(n), 1) / max(int(counts[label]), 1)) ** 0.8 for n in counts]
            others = sum(scale[j] * torch.exp(row[j]) for j in range(CLASSES) if j != label)
            total = total - torch.log(torch.exp(row[label]) / (torch.exp(row[label]) + others))
    return total / int(inputs.valid.sum())


@pytest.mark.parametrize("kind", ["seesaw", "row-6-seesaw"])
def test_gradients_are_those_of_the_branches_losses_alone(
    data: DataSplits, model: Model, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(finetuned(kind, "optimizer.clip=null"), data, tmp_path / "run", model(kind))
    run.start(resume=False)
    with closing(run.batches()) as batches:
        first = next(batches)
    assert not any(own.features.requires_grad for own in first.stages)
    branches = [stage.second_branch for stage in run.detector.stages]
    parameters = [{k: v.detach().double().requires_grad_() for k, v in b.named_parameters()} for b in branches]
    found: dict[str, Tensor] = {}

    def keep(*_: Any, **__: Any) -> None:
        found.update({k: p.grad.clone() for k, p in run.detector.named_parameters() if p.grad is not None})

    monkeypatch.setattr(torch.optim.AdamW, "step", keep)
    run.train_step(iter([first]))
    weights = [stage.weight for stage in run.recipe.model.stages]
    losses = []
    for branch, inputs, own in zip(branches, first.stages, parameters, strict=True):
        counts = torch.bincount(inputs.labels[inputs.valid], minlength=CLASSES + 1)[:CLASSES]  # of this step too
        losses.append(float64_loss(branch, inputs, counts, own))
    sum(w * loss for w, loss in zip(weights, losses, strict=True)).backward()
    assert set(found) == {name for name, _ in run.detector.named_parameters() if SECOND in name}
    for n, own in enumerate(parameters):
        for name, value in own.items():
            assert value.grad is not None
            gradient = found[f"stages.{n}.second_branch.{name}"].double()
            scale = value.grad.abs().max().item()
            assert scale > 0
            torch.testing.assert_close(gradient, value.grad, rtol=0, atol=2e-5 * scale)
    (line,) = logged(run.out)
    names = ("classes", "objectness")
    prefixes = [""] if len(weights) == 1 else ["stage1.", "stage2.", "stage3."]
    assert set(line) == {"step", "loss", "lr", "gradient"} | {prefix + name for prefix in prefixes for name in names}
    assert line["loss"] == pytest.approx(sum(w * v.item() for w, v in zip(weights, losses, strict=True)), rel=1e-5)


def test_what_a_sample_shows_depends_on_no_neighbour(data: DataSplits, model: Model, tmp_path: Path) -> None:
    """The same (image, seed) alone, in two batches, after other random numbers."""
    run = run_of(finetuned("row-6-seesaw", "finetune.views=2"), data, tmp_path / "run", model("row-6-seesaw"))
    other = run_of(
        finetuned("row-6-seesaw", "finetune.views=2", "data.batch_per_device=5"),
        data,
        tmp_path / "o",
        model("row-6-seesaw"),
    )
    alone: dict[tuple[int, int], BranchInputs] = {}
    assert isinstance(run.learner, Finetuning)
    for sample in run.sampler.all_views(range(2)):
        image = run.learner.images[sample]
        torch.manual_seed(len(alone))
        state = torch.get_rng_state()
        alone[sample] = run.learner.frozen(image.batch, image.seed)
        assert torch.equal(torch.get_rng_state(), state)
    shapes = {tuple(run.dataset[sample].image.shape) for sample in alone}
    assert len(shapes) > 1
    for one in (run, other):
        steps = 2 * one.sampler.steps_per_epoch
        with closing(one.batches()) as batches:
            for inputs, pairs in zip(islice(batches, steps), one.sampler.iterate(), strict=False):
                expected = join([alone[pair] for pair in pairs])
                for a, b in zip(inputs.stages, expected.stages, strict=True):
                    assert bits(a.features) == bits(b.features)
                    assert torch.equal(a.labels, b.labels)
                    assert torch.equal(a.valid, b.valid)


def test_images_that_hold_nothing(data: DataSplits, model: Model, tmp_path: Path) -> None:
    """A crop may have cut all objects off: everything is background, and gradients are finite."""
    run = run_of(finetuned("row-6-seesaw"), data, tmp_path / "run", model("row-6-seesaw"))
    assert isinstance(run.learner, Finetuning)
    sample = run.dataset[0]
    empty = collate([type(sample)(
        image=sample.image, instances=sample.instances[torch.zeros(0, dtype=torch.int64)], absent=sample.absent,
        image_id=1, original_hw=sample.original_hw,
    )])  # fmt: skip
    inputs = run.learner.frozen(empty, 3)
    assert all((own.labels[own.valid] == CLASSES).all() for own in inputs.stages)
    losses = run.model(inputs)
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in run.learner.branches.parameters())
    assert all(value.item() == 0 for name, value in losses.items() if name.endswith("classes"))


# ---------------------------------------------------------------------------------------------------------
# Whole runs, with and without a cache, stopped and resumed


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the seed of every sample that the frozen part is asked about."""
    seeds: list[int] = []
    call = Frozen.__call__

    def counted(self: Frozen, batch: Any, seed: int) -> BranchInputs:
        seeds.append(seed)
        return call(self, batch, seed)

    monkeypatch.setattr(Frozen, "__call__", counted)
    return seeds


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("seesaw", ("finetune.views=1", "schedule.epochs=2", "training.ema=0.7", "data.workers=1")),
        ("row-6-seesaw", ("finetune.views=2", "schedule.epochs=2", "training.precision=bf16")),
        (
            "seesaw-4conv1fc",
            ("finetune.views=3", "schedule.epochs=2", "training.accumulate=2", "finetune.start=random"),
        ),
    ],
)
def test_a_cached_run_is_the_plain_one_bit_for_bit_and_both_are_resumed_exactly(
    data: DataSplits,
    model: Model,
    tmp_path: Path,
    kind: str,
    settings: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    computed: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def copied(self: Run, _stop: list[int]) -> bool:
        """Before the last step a run saves what it saves when it is told to stop, and that is copied."""
        if self.step == self.total_steps - 1:
            self.save()
            shutil.copytree(self.out, f"{self.out}-in-parts")
        return False

    caplog.set_level(logging.INFO, logger="tailseg")
    plain, cached = finetuned(kind, *settings), finetuned(kind, *settings, "finetune.cache=true")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "agreed", copied)
        train(plain, data, tmp_path / "plain", init=model(kind), show=False)
        steps = logged(tmp_path / "plain")[-1]["step"]
        images, accumulate = 2 * steps * plain.training.accumulate, plain.training.accumulate
        assert len(computed) == images
        assert "cache" not in caplog.text.replace(str(tmp_path), "")
        views = set(computed)
        computed.clear()
        train(cached, data, tmp_path / "cached", init=model(kind), show=False)
    assert sorted(computed) == sorted(views) if accumulate == 1 else set(computed) >= views
    assert len(computed) < images
    assert_same_run(tmp_path / "cached", tmp_path / "plain")
    assert not (tmp_path / "cached" / "features").exists()
    assert f"in {tmp_path / 'cached' / 'features'} until the run is complete." in caplog.text
    assert "Removed the feature cache (" in caplog.text
    for name, recipe in (("plain", plain), ("cached", cached)):
        out = tmp_path / f"{name}-in-parts"
        assert (out / "features").exists() == (name == "cached")
        assert logged(out)[-1]["step"] == steps - 1
        computed.clear()
        train(recipe, data, out, resume=True, show=False)
        assert len(computed) == (2 * accumulate if name == "plain" else 0)
        assert_same_run(out, tmp_path / name)


def test_a_cache_is_read_and_no_image_is(
    data: DataSplits, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: Callable[[int], None]
) -> None:
    recipe = finetuned("seesaw", "finetune.views=1", "finetune.cache=true", "schedule.epochs=3")
    stop_at(1)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, data, tmp_path / "run", init=model("seesaw"), show=False)
    stop_at(-1)

    def never(*_: Any) -> Any:
        raise AssertionError("there is a cache")

    monkeypatch.setattr(finetune.SingleImages, "__getitem__", never)
    monkeypatch.setattr(Frozen, "__call__", never)
    train(recipe, data, tmp_path / "run", resume=True, show=False)
    assert {row["step"] for row in logged(tmp_path / "run")} == set(range(1, logged(tmp_path / "run")[-1]["step"] + 1))


def test_a_longer_schedule_fills_the_cache_again(
    data: DataSplits, model: Model, tmp_path: Path, computed: list[int]
) -> None:
    settings = ("finetune.views=1", "finetune.cache=true", "schedule.milestones=[]")
    recipes = {epochs: finetuned("seesaw", *settings, f"schedule.epochs={epochs}") for epochs in (1, 2)}
    train(recipes[1], data, tmp_path / "run", init=model("seesaw"), show=False)
    first = len(computed)
    train(recipes[1], data, tmp_path / "run", resume=True, show=False)  # complete: nothing to be done
    assert len(computed) == first
    train(recipes[2], data, tmp_path / "run", resume=True, show=False)
    assert len(computed) == 2 * first
    train(recipes[2], data, tmp_path / "whole", init=model("seesaw"), show=False)
    assert differing(tmp_path / "run", tmp_path / "whole", "trainer.safetensors") == []


def test_a_filling_that_is_stopped_or_killed_goes_on(
    data: DataSplits, model: Model, tmp_path: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = finetuned("seesaw", "finetune.views=1", "finetune.cache=true")
    train(recipe, data, tmp_path / "whole", init=model("seesaw"), show=False)
    assert len(computed) == IMAGES
    write = FeatureCache.write

    def interrupted(self: FeatureCache, *arguments: Any) -> None:
        write(self, *arguments)
        if len(computed) == 4:
            os.kill(os.getpid(), signal.SIGINT)

    def killed(self: FeatureCache, index: int, seed: int, tensors: dict[str, Tensor]) -> None:
        if len(computed) == 7:
            self.path(index, seed).parent.joinpath(f".{self.path(index, seed).name}.1.part").write_text("half")
            raise SystemExit(9)
        write(self, index, seed, tensors)

    out = tmp_path / "interrupted"
    computed.clear()
    with monkeypatch.context() as patch:
        patch.setattr(FeatureCache, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, data, out, init=model("seesaw"), show=False)
    assert len(list((out / "features").rglob("*.safetensors"))) == 4
    train(recipe, data, out, resume=True, show=False)
    assert len(computed) == IMAGES
    assert_same_run(out, tmp_path / "whole")

    out = tmp_path / "killed"
    computed.clear()
    with monkeypatch.context() as patch:
        patch.setattr(FeatureCache, "write", killed)
        with pytest.raises(SystemExit):
            train(recipe, data, out, init=model("seesaw"), show=False)
    assert not (out / "trainer.safetensors").exists()
    train(recipe, data, out, init=model("seesaw"), show=False)
    assert len(computed) == IMAGES + 1  # the one that was being written came twice
    assert_same_run(out, tmp_path / "whole")


@pytest.mark.parametrize("state", [finetune.STOPPED, finetune.IN_TROUBLE])
def test_processes_stop_together(
    data: DataSplits, model: Model, tmp_path: Path, computed: list[int], state: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two processes this is the second; in its third round the first one stops, or cannot go on: both say why."""
    recipe = finetuned("seesaw", "finetune.views=1", "finetune.cache=true")
    run = run_of(recipe, data, tmp_path / "run", model("seesaw"))
    said: list[float] = []

    def reduced(own: Tensor, reduce_op: str) -> Tensor:
        assert reduce_op == "max"
        said.append(own.item())
        return own.clamp(min=state if len(said) == 3 else 0)

    first = type("first", (), {
        "global_rank": 1, "world_size": 2, "device": torch.device("cpu"), "all_reduce": staticmethod(reduced),
        "barrier": staticmethod(lambda: None),
    })  # fmt: skip
    assert isinstance(run.learner, Finetuning)
    assert run.learner.cache is not None
    run.learner.cache.claim(run.learner.about())  # as the first one does
    if state == finetune.STOPPED:
        assert not run.learner.fill(range(1), first, [], show=False)
    else:
        monkeypatch.setattr(finetune, "first_trouble", lambda _, own: own or "a.jpg: is broken")
        with pytest.raises(UserError, match=r"^a\.jpg: is broken$"):
            run.learner.fill(range(1), first, [], show=False)
    assert said == [0, 0, 0]
    every_second = run.sampler.all_views(range(1))[1::2]
    assert computed == [seed for _, seed in every_second[:3]]
    assert len(run.learner.cache.missing(every_second)) == len(every_second) - 3


def test_the_cache_knows_what_decides_which_objects_are_pasted(data: DataSplits, model: Model, tmp_path: Path) -> None:
    def about(name: str, *settings: str) -> dict[str, Any]:
        recipe = finetuned("seesaw", "finetune.views=1", "finetune.cache=true", *settings)
        run = run_of(recipe, data, tmp_path / name, model("seesaw"))
        assert isinstance(run.learner, Finetuning)
        return run.learner.about()

    plain, pasting = about("plain"), about("pasting", "data.copy_paste=0.5")
    assert (plain["data.copy_paste"], pasting["data.copy_paste"]) == (0, 0.5)
    assert pasting["data.repeat_threshold"] == 1
    for key in ("data.sampler", "data.epoch_images", "data.repeat_rounding", "data.workers"):
        assert key not in pasting
    assert "data.repeat_threshold" not in plain
    assert about("uniform", "data.copy_paste=0.5", "data.copy_paste_draw=uniform").keys() == plain.keys()


def test_views_are_all_that_an_image_shows(data: DataSplits, model: Model, tmp_path: Path, computed: list[int]) -> None:
    counts = {}
    for views in ("1", "2", "null"):
        computed.clear()
        settings = (f"finetune.views={views}", "schedule.epochs=2", "schedule.milestones=[]")
        train(finetuned("seesaw", *settings), data, tmp_path / views, init=model("seesaw"), show=False)
        counts[views] = (len(computed), len(set(computed)))
    total = counts["null"][0]
    assert counts == {"1": (total, IMAGES), "2": (total, 2 * IMAGES), "null": (total, total)}
    # Elsewhere the section means nothing, and the model without finetuning sees ever new samples.
    run = Run(launch(1), recipe_of("seesaw", "finetune.views=1"), data, tmp_path / "other", 0)
    seeds = [seed for pairs in islice(run.sampler.iterate(), 20) for _, seed in pairs]
    assert len(set(seeds)) == len(seeds)


# ---------------------------------------------------------------------------------------------------------
# Two processes


def in_processes(devices: int, folder: Path, init: Path, out: Path, *settings: str) -> None:
    """The command with row 6, until its end; processes that wait for each other for ever are ended."""
    name, own = KINDS["row-6-seesaw"]
    line = (
        "train",
        name,
        "--data",
        folder,
        "--init",
        init,
        "--out",
        out,
        *options((*TINY, *own, *FINETUNE, *settings)),
    )
    said = out.with_suffix(".stderr")
    codes = run_together(COMMAND, *[line] * devices, linked=True, stderr=said)
    assert codes == [0] * devices, said.read_text()
    assert "Batch norm" not in said.read_text()  # none learns


@pytest.mark.slow
def test_two_processes(folder: Path, model: Model, tmp_path: Path) -> None:
    """They share the cache's work and learn what one process does with the images of both."""
    init, views = model("row-6-seesaw"), "finetune.views=1"
    cached = (views, "finetune.cache=true", "data.batch_per_device=1", "optimizer={name: sgd, lr: 0.05, clip: null}")
    in_processes(2, folder, init, tmp_path / "cached", *cached)
    assert not (tmp_path / "cached" / "features").exists()
    one = (views, "optimizer={name: sgd, lr: 0.05, clip: null}")
    train(finetuned("row-6-seesaw", *one), open_data(str(folder)), tmp_path / "one", init=init, show=False)
    before, both, alone = load_file(init), load_file(tmp_path / "cached" / "last.safetensors"), None
    alone = load_file(tmp_path / "one" / "last.safetensors")
    assert [key for key in before if bits(before[key]) != bits(both[key])] == []
    assert both.keys() == alone.keys()
    for key in (key for key in both if SECOND in key):
        if not both[key].is_floating_point():
            assert torch.equal(both[key], alone[key]), key
            continue
        moved = (both[key] - alone[key]).abs().max()
        assert moved <= 1e-5 * alone[key].abs().max() + 1e-7, key
    key = "stages.2.second_branch.layers.1.weight"
    assert (both[key] - before["stages.2.box_head.class_branch.2.weight"]).abs().max() > 1e-4


# ---------------------------------------------------------------------------------------------------------
# Faulty input, through the real command


Refused = Callable[..., str]


@pytest.fixture
def refused(folder: Path) -> Refused:
    """A function: arguments and settings of `tailseg train` -> the one sentence with which it ends, exit code 1."""

    def run(out: Path, *arguments: object, kind: str = "seesaw", settings: tuple[str, ...] = FINETUNE) -> str:
        name, own = KINDS[kind]
        more = options((*TINY, *own, *settings))
        done = tailseg("train", name, "--data", folder, "--out", out, "--quiet", *arguments, *more)
        assert_refused(done)
        return done.stderr.strip().removeprefix("tailseg: ")

    return run


def test_a_model_is_needed(refused: Refused, tmp_path: Path) -> None:
    line = refused(tmp_path / "run")
    assert line.startswith("finetune.enabled: adds classification branches to a trained model; name it with --init")
    assert not (tmp_path / "run").exists()
    assert "holds no trainer.safetensors" in refused(tmp_path / "run", "--resume")


@pytest.mark.parametrize(
    ("kind", "settings", "named"),
    [
        ("row-6-seesaw", (), "the recipe builds another architecture; train with the model's own recipe"),
        ("cross-entropy", (), "has classifier.loss = seesaw, the recipe cross-entropy, and finetune.enabled leaves"),
        ("seesaw", ("classifier.temperature=10",), "has classifier.temperature = 20.0, the recipe 10.0"),
        ("seesaw", ("model.rpn.anchor_scale=8",), "has model.rpn.anchor_scale = 4.0, the recipe 8.0"),
        ("seesaw", ("model.stages=[{stds: [1, 1, 1, 1]}]",), "has model.stages.0.stds = [0.1, 0.1, 0.2, 0.2]"),
        ("seesaw", ("model.neck.channels=16",), "has shape"),
    ],
)
def test_another_model_is_refused(
    refused: Refused, model: Model, tmp_path: Path, kind: str, settings: tuple[str, ...], named: str
) -> None:
    init = model("seesaw")
    line = refused(tmp_path / "run", "--init", init, kind=kind, settings=(*FINETUNE, *settings))
    assert line.startswith(f"--init {init}: ")
    assert named in line
    assert not (tmp_path / "run").exists()


def test_a_cache_of_something_else_is_refused(
    refused: Refused, model: Model, data: DataSplits, folder: Path, tmp_path: Path, stop_at: Callable[[int], None]
) -> None:
    """Of another model, other augmentation, other annotations, or of unknown origin; what may differ does."""
    out, settings = tmp_path / "run", (*FINETUNE, "finetune.views=1", "finetune.cache=true")
    stop_at(1)
    with pytest.raises(KeyboardInterrupt):
        train(recipe_of("seesaw", *settings), data, out, init=model("seesaw"), show=False)
    stop_at(-1)
    (out / "trainer.safetensors").unlink()  # as if killed before the first checkpoint
    fix = "; remove the folder, and they are computed again"
    other = tmp_path / "other.safetensors"
    about = load_model(model("seesaw"))
    about.state["neck.lateral_convs.0.bias"][0] += 1e-6
    save_model(other, about.state, about.recipe, about.categories, step=0)
    line = refused(out, "--init", other, settings=settings)
    assert line == f"{out / 'features'}: holds features made with another frozen model{fix}"
    for changed in ("data.flip=0.25", "model.box_head.rois=16", "training.precision=bf16"):
        line = refused(out, "--init", model("seesaw"), settings=(*settings, changed))
        assert line == f"{out / 'features'}: holds features made with another {changed.partition('=')[0]}{fix}"
    (tmp_path / "moved").mkdir()
    content = json.loads((folder / "train.json").read_text())
    content["annotations"][0]["bbox"][2] -= 1
    (tmp_path / "moved" / "train.json").write_text(json.dumps(content))
    for name in ("val.json", "images"):
        (tmp_path / "moved" / name).symlink_to(folder / name)
    with pytest.raises(UserError, match="made with another annotation file; remove the folder"):
        train(recipe_of("seesaw", *settings), open_data(str(tmp_path / "moved")), out, init=model("seesaw"), show=False)
    (out / "features" / "about.json").write_text("{")
    assert "its about.json is missing or broken" in refused(out, "--init", model("seesaw"), settings=settings)
    (out / "features" / "about.json").unlink()
    assert fix in refused(out, "--init", model("seesaw"), settings=settings)


def test_a_broken_file_of_the_cache(
    model: Model, data: DataSplits, tmp_path: Path, stop_at: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    """It is computed again, counted and said; the run is the one that it would have been."""
    out, settings = tmp_path / "run", (*FINETUNE, "finetune.views=1", "finetune.cache=true")
    stop_at(1)
    with pytest.raises(KeyboardInterrupt):
        train(recipe_of("seesaw", *settings), data, out, init=model("seesaw"), show=False)
    stop_at(-1)
    files = sorted((out / "features").rglob("*.safetensors"))
    assert len(files) == IMAGES
    whole = {file: file.read_bytes() for file in files}

    def emptied(file: Path) -> None:
        file.write_bytes(b"")

    def cut(file: Path) -> None:
        file.write_bytes(whole[file][: len(whole[file]) // 2])

    def foreign(file: Path) -> None:
        save_file({"x": torch.zeros(2)}, file)

    def one_bit(file: Path) -> None:
        """In the last value: a number like any other, which nothing but the checksum tells."""
        content = bytearray(whole[file])
        content[-1] ^= 1
        file.write_bytes(content)

    train(recipe_of("seesaw", *settings), data, tmp_path / "whole", init=model("seesaw"), show=False)
    for name, spoil, workers in (
        ("emptied", emptied, 0),
        ("cut", cut, 2),
        ("foreign", foreign, 0),
        ("bit", one_bit, 2),
    ):
        again = tmp_path / name
        shutil.copytree(out, again)
        copies = sorted((again / "features").rglob("*.safetensors"))
        for file, copy in zip(files, copies, strict=True):
            spoil(file)
            shutil.copy(file, copy)
            file.write_bytes(whole[file])
        caplog.clear()
        train(recipe_of("seesaw", *settings, f"data.workers={workers}"), data, again, resume=True, show=False)
        (said,) = [message for message in caplog.messages if message.startswith("Feature cache: ")]
        count = int(said.split()[2])
        assert 0 < count <= IMAGES  # those that the rest of the run looks at
        assert any(f"not as they were written, such as {copy}; they were computed again" in said for copy in copies)
        assert differing(again, tmp_path / "whole", "trainer.safetensors") == []


def test_a_full_disk_is_told_before_it_is_filled(
    refused: Refused, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, computed: list[int]
) -> None:
    out, settings = tmp_path / "run", (*FINETUNE, "finetune.views=2", "finetune.cache=true", "schedule.epochs=2")
    # One stage of 24 RoIs: 8 x 49 float32, a label, a flag; twenty views and a tenth more.
    each = 24 * (8 * 49 * 4 + 8 + 1)
    needed = int(2 * IMAGES * each * 1.1)
    usage = type("usage", (), {"free": needed - 1})
    monkeypatch.setattr(finetune.shutil, "disk_usage", lambda _path: usage)
    line = refused(out, "--init", model("seesaw"), settings=settings)
    assert line == (
        f"{out / 'features'}: finetune.cache needs {needed} bytes ({readable(needed)}) for 20 views of images, "
        f"{readable(each)} each, and {readable(needed - 1)} are free; make room, choose an --out on a larger disk, "
        "lower finetune.views or set finetune.cache=false"
    )
    assert len(computed) == 1
    assert list((out / "features").rglob("*.safetensors")) == []
    usage.free = needed
    save = feature_cache.write_tensors

    def full(path: Path, *arguments: Any) -> None:
        if len(computed) < 5:
            save(path, *arguments)
            return
        with monkeypatch.context() as patch:
            patch.setattr("tailseg.checkpoint.save_file", _no_space)
            save(path, *arguments)

    monkeypatch.setattr(feature_cache, "write_tensors", full)
    line = refused(out, "--init", model("seesaw"), settings=settings)
    assert "could not be saved (No space left on device), and what stood there is intact; make room" in line
    assert f"and the cache needs {17 * each} bytes ({readable(17 * each)}) more" in line
    assert len(list((out / "features").rglob("*.safetensors"))) == 3


def _no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_resuming_needs_the_same_section(
    refused: Refused, model: Model, data: DataSplits, tmp_path: Path, stop_at: Callable[[int], None]
) -> None:
    out = tmp_path / "run"
    stop_at(1)
    with pytest.raises(KeyboardInterrupt):
        train(finetuned("seesaw", "finetune.views=2"), data, out, init=model("seesaw"), show=False)
    for changed, was in (
        ("finetune.views=3", "2"),
        ("finetune.start=random", "copy"),
        ("finetune.cache=true", "False"),
    ):
        line = refused(out, "--resume", settings=(*FINETUNE, "finetune.views=2", changed))
        assert f"cannot resume with {changed.partition('=')[0]} = " in line
        assert f"the run began with {was}" in line


# ---------------------------------------------------------------------------------------------------------
# Parts


def some_inputs(rows: int, features: int = 3, stages: int = 2) -> BranchInputs:
    generator = torch.Generator().manual_seed(rows)
    return BranchInputs(
        stages=tuple(
            ClassInputs(
                features=torch.randn(rows, features, generator=generator),
                labels=torch.randint(0, 5, (rows,), generator=generator),
                valid=torch.rand(rows, generator=generator) < 0.5,
            )
            for _ in range(stages)
        )
    )


def test_inputs_are_joined_in_order_and_survive_a_file(tmp_path: Path) -> None:
    parts = [some_inputs(rows) for rows in (3, 0, 2)]
    whole = join(parts)
    for n, own in enumerate(whole.stages):
        assert torch.equal(own.features, torch.cat([part.stages[n].features for part in parts]))
        assert torch.equal(own.labels, torch.cat([part.stages[n].labels for part in parts]))
        assert own.valid.shape == (5,)
    cache = FeatureCache(tmp_path / "features")
    for seed, part in enumerate(parts):
        cache.write(1234, seed, part.tensors())
        tensors = cache.read(1234, seed, list(part.tensors()))
        assert tensors is not None
        back = BranchInputs.of(tensors)
        for a, b in zip(back.stages, part.stages, strict=True):
            assert torch.equal(a.features, b.features)
            assert torch.equal(a.labels, b.labels)
            assert torch.equal(a.valid, b.valid)
    assert cache.missing([(1234, 0), (1234, 9), (0, 0)]) == [(1234, 9), (0, 0)]
    assert FeatureCache(tmp_path / "none").missing([(1, 2)]) == [(1, 2)]
    size = sum(file.stat().st_size for file in (tmp_path / "features").rglob("*.safetensors"))
    assert cache.remove() == size > 0
    assert cache.remove() == 0


def test_a_branch_without_rows_has_a_loss_and_gradients(data: DataSplits, model: Model, tmp_path: Path) -> None:
    run = run_of(finetuned("seesaw"), data, tmp_path / "run", model("seesaw"))
    branches = Branches(run.detector)
    losses = branches(some_inputs(0, features=8 * 49, stages=1))
    assert {name: value.item() for name, value in losses.items()} == {"classes": 0, "objectness": 0}
    sum(losses.values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None and p.grad.count_nonzero() == 0 for p in branches.parameters())


def test_room_is_needed_for_all_and_a_tenth_more() -> None:
    require_room(Path("f"), 10, 100, 1100)
    require_room(Path("f"), 0, 100, 0)
    with pytest.raises(
        UserError, match=r"f: finetune.cache needs 1100 bytes \(1.1 kB\) for 10 views of images, 100 bytes"
    ):
        require_room(Path("f"), 10, 100, 1099)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (77_070_336, "77.1 MB"),
        (999_600_000, "1 GB"),
        (7.7e12, "7.7 TB"),
    ],
)
def test_sizes_are_readable(size: int, text: str) -> None:
    assert readable(size) == text


def test_digests_tell_models_and_annotations_apart(data: DataSplits, folder: Path, tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(True)}
    digest = digest_of_tensors(tensors)
    assert digest == digest_of_tensors({k: v.clone() for k, v in tensors.items()})
    maps = torch.rand(2, 3, 4, 5)
    assert digest_of_tensors({"m": maps}) == digest_of_tensors({"m": maps.to(memory_format=torch.channels_last)})
    for other in (
        {**tensors, "a": tensors["a"].view(3, 2)},
        {**tensors, "a": tensors["a"].double()},
        {**tensors, "b": torch.tensor(False)},
        {"a": tensors["a"]},
        {"c": tensors["a"], "b": tensors["b"]},
    ):
        assert digest_of_tensors(other) != digest
    assert data.train is not None
    assert data.val is not None
    known = digest_of_annotations(data.train)
    (tmp_path / "copy").mkdir()
    for name in ("train.json", "val.json"):
        (tmp_path / "copy" / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "copy" / "images").symlink_to(folder / "images")
    moved = open_data(str(tmp_path / "copy"))
    assert moved.train is not None
    assert digest_of_annotations(moved.train) == known  # wherever it lies
    assert digest_of_annotations(data.val) != known
    content = json.loads((folder / "train.json").read_text())
    content["annotations"][-1]["segmentation"] = content["annotations"][0]["segmentation"]  # which crops look at
    (tmp_path / "copy" / "train.json").write_text(json.dumps(content))
    changed = open_data(str(tmp_path / "copy"))
    assert changed.train is not None
    assert digest_of_annotations(changed.train) != known


def test_frozen_is_frozen(model: Model) -> None:
    detector: Detector = load(model("row-6-seesaw"), "cpu").detector.train().requires_grad_(True)
    Frozen(detector, bf16=False)
    assert not any(module.training for module in detector.modules())
    assert not any(parameter.requires_grad for parameter in detector.parameters())


def test_starting_from_a_finetuned_model_keeps_its_branches(data: DataSplits, model: Model, tmp_path: Path) -> None:
    recipe = finetuned("seesaw", "optimizer.lr=0.1")
    train(recipe, data, tmp_path / "run", init=model("seesaw"), show=False)
    theirs = load_file(tmp_path / "run" / "last.safetensors")
    assert data.train is not None
    detector = build_detector(recipe, CLASSES)
    note = start_from(load_model(tmp_path / "run" / "last.safetensors"), detector, recipe, data.train.categories)
    assert note.endswith("; second branches go on from the model's own")
    state = detector.state_dict()
    assert [key for key in theirs if not torch.equal(theirs[key], state[key])] == []
    assert F.relu(state["stages.0.second_branch.classification.seesaw.counts"]).sum() > 0
