"""Steps replayed from graphs equal steps as ever; on the CPU a graph calls what was recorded again on its tensors."""

import copy
import json
import logging
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny import SMALL_RECIPE
from torch import Tensor, nn

from tailseg.data.batches import collate
from tailseg.data.sources import DataSplits, open_data
from tailseg.data.synthetic.generate import SyntheticSettings, write_synthetic
from tailseg.model.build import build_detector
from tailseg.model.detector import Detector
from tailseg.recipes.resolve import resolve
from tailseg.structures import Batch, Instances, Sample
from tailseg.training import graphs
from tailseg.training.graphs import GRAPHS, GraphedStep, Outcome, cuda_graphs, has_graphs, why_none
from tailseg.training.loop import Run, train

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CLASSES = 5
TSD = (
    "model.backbone.name=tf_efficientnet_lite0",
    "model.box_head={width: 16, rois: 8, max_positive: 4}",
    "model.rpn={pre_nms_train: 30, post_nms_train: 16}",
)


class CalledAgain:
    """Of a graph, what the host sees: recording changes nothing, and only tensors are looked at by replays.

    Args:
        model: whose buffers and gradients the work changes in place.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state(self) -> list[Tensor]:
        gradients = [p.grad for p in self.model.parameters() if p.requires_grad and p.grad is not None]
        return [*self.model.buffers(), *gradients]

    def record(self, work: Callable[[], Tensor]) -> Tensor:
        self.tensors, numbers = self.state(), torch.get_rng_state()
        before = [tensor.clone() for tensor in self.tensors]
        self.work, self.values = work, work()
        self.require_same_tensors()
        for tensor, value in zip(self.tensors, before, strict=True):
            tensor.copy_(value)
        torch.set_rng_state(numbers)
        return self.values.fill_(torch.nan)

    def replay(self) -> None:
        self.require_same_tensors()
        self.values.copy_(self.work())

    def require_same_tensors(self) -> None:
        now = self.state()
        assert len(now) == len(self.tensors)
        assert all(one is other for one, other in zip(now, self.tensors, strict=True))


class Refused:
    """A graph of a device that cannot record the work."""

    def record(self, work: Callable[[], Tensor]) -> Tensor:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCompile with ...")

    def replay(self) -> None:
        raise AssertionError


def sample(hw: tuple[int, int], objects: int, generator: torch.Generator) -> Sample:
    corners = torch.rand(objects, 2, generator=generator) * min(hw) / 2
    boxes = torch.cat([corners, corners + 10 + 10 * torch.rand(objects, 2, generator=generator)], dim=1)
    masks = torch.zeros(objects, 28, 28, dtype=torch.uint8)
    masks[:, 4:20, 6:24] = 255
    instances = Instances(
        boxes=boxes,
        labels=torch.randint(0, CLASSES, (objects,), generator=generator),
        masks=masks,
        mask_frames=boxes,
    )
    image = torch.randint(0, 256, (3, *hw), dtype=torch.uint8, generator=generator)
    return Sample(
        image=image, instances=instances, absent=torch.zeros(CLASSES, dtype=torch.bool), image_id=1, original_hw=hw
    )


def batches() -> list[Batch]:
    """Five, of different sizes and numbers of objects, and of two shapes."""
    generator = torch.Generator().manual_seed(0)
    hws = [(50, 64), (64, 40), (40, 70), (64, 96), (48, 56)]
    return [collate([sample(hw, n % 4, generator)], 32, few_shapes=True) for n, hw in enumerate(hws)]


def detector(name: str, *settings: str) -> Detector:
    torch.manual_seed(0)
    return build_detector(resolve(name, [*SMALL_RECIPE, *settings]), CLASSES).train()


def work_of(model: Detector) -> Callable[[Batch], Outcome]:
    def work(batch: Batch) -> Outcome:
        losses = model(batch)
        torch.stack(list(losses.values())).sum().backward()
        return {name: loss.detach() for name, loss in losses.items()}, {"classes": batch.labels.sum().float()}

    return work


def trained(
    model: Detector, step: GraphedStep, batches: list[Batch]
) -> list[tuple[Outcome, dict[str, Tensor], dict[str, Tensor]]]:
    """Of every step its outcome, the gradients and the buffers after it."""
    found = []
    for number, batch in enumerate(batches):
        torch.manual_seed(number)
        outcome = step(batch)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((outcome, gradients, {name: b.clone() for name, b in model.named_buffers()}))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 1e-4 * parameter.grad
        model.zero_grad(set_to_none=not step.keeps_gradients)
    return found


@pytest.mark.parametrize(
    ("name", "settings"),
    [("demo/seesaw", ()), ("table2/06-mask-scoring", TSD)],
    ids=["mask-rcnn-seesaw", "cascade-tsd"],
)
def test_replayed_steps_equal_steps_as_ever(name, settings, monkeypatch):
    monkeypatch.setattr("tailseg.data.batches.FEW_SHAPES_DIVISOR", 64)
    model = detector(name, *settings)
    twin = copy.deepcopy(model)
    replayed = GraphedStep(work_of(model), CPU, lambda: CalledAgain(model))
    replayed.watched = True  # nothing waits for a CPU
    found = trained(model, replayed, batches())
    expected = trained(twin, GraphedStep(work_of(twin), CPU, None), batches())
    assert sorted(replayed.counts.values()) == [2, 3]
    assert len(replayed.recorded) == 2
    for (own, own_gradients, own_buffers), (outcome, gradients, buffers) in zip(found, expected, strict=True):
        for values, wanted in zip(own, outcome, strict=True):
            assert values.keys() == wanted.keys()
            assert all(torch.equal(values[key], value) for key, value in wanted.items())
        assert own_gradients.keys() == gradients.keys()
        assert [key for key, value in gradients.items() if not torch.equal(own_gradients[key], value)] == []
        assert [key for key, value in buffers.items() if not torch.equal(own_buffers[key], value)] == []


def test_rows_of_padding_change_nothing():
    """Where all candidates are sampled, so that it makes no difference which random number is whose."""
    model = detector("demo/seesaw", "model.box_head={width: 32, rois: 400, max_positive: 400}")
    generator = torch.Generator().manual_seed(1)
    samples = [sample((64, 64), 3, generator), sample((60, 50), 1, generator)]
    losses, gradients = [], []
    for few_shapes in (False, True):
        twin, batch = copy.deepcopy(model), collate(samples, 128, few_shapes=few_shapes)
        assert batch.boxes.shape[1] == (32 if few_shapes else 3)
        torch.manual_seed(0)
        losses.append(work_of(twin)(batch)[0])
        gradients.append({name: p.grad for name, p in twin.named_parameters() if p.grad is not None})
    for key, value in losses[0].items():
        torch.testing.assert_close(losses[1][key], value, rtol=1e-5, atol=1e-7)
    for key, value in gradients[0].items():
        assert (gradients[1][key] - value).norm() <= 1e-4 * value.norm() + 1e-7, key


# ---------------------------------------------------------------------------------------------------------
# Which shapes are recorded


class Sum(nn.Module):
    """A model of one weight: its loss is the weight times the sum of the labels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.calls = 0

    def work(self, batch: Batch) -> Outcome:
        self.calls += 1
        loss = self.weight * batch.labels.sum()
        loss.backward()
        return {"loss": loss.detach()}, {}


def labelled(rows: int, value: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    batch = collate([sample((8, 8), rows, generator)], 8)
    batch.labels.fill_(value)
    return batch


def test_outcomes_are_not_overwritten_by_later_replays():
    model = Sum()
    step = GraphedStep(model.work, CPU, lambda: CalledAgain(model))
    outcomes = [step(labelled(1, value)) for value in range(1, 6)]
    assert [float(losses["loss"]) for losses, _ in outcomes] == [2, 4, 6, 8, 10]
    assert model.weight.grad is not None
    assert float(model.weight.grad) == 1 + 2 + 3 + 4 + 5  # added up until somebody sets it to zero


def test_a_shape_is_recorded_the_second_time_and_a_rare_one_makes_room():
    model = Sum()
    step = GraphedStep(model.work, CPU, lambda: CalledAgain(model), most=2)

    def rows(*numbers: int) -> list[int]:
        for number in numbers:
            losses, _ = step(labelled(number, 1))
            assert float(losses["loss"]) == 2 * number
        return sorted(shape[4][0][1] for shape in step.recorded)  # type: ignore[index]

    assert rows(1, 1) == []  # as ever, and once more to look for what cannot be recorded
    assert rows(1) == [1]
    assert rows(2) == [1]
    assert rows(2) == [1, 2]
    assert rows(3, 3, 3) == [1, 2]  # no room: 2 came twice, so 3 would have to come four times
    assert rows(3) == [1, 3]
    assert rows(2, 2) == [1, 3]  # four times each


def test_what_cannot_be_recorded_ends_the_graphs_and_not_the_run(caplog: pytest.LogCaptureFixture):
    model = Sum()
    step = GraphedStep(model.work, CPU, Refused)
    assert [float(step(labelled(1, value))[0]["loss"]) for value in range(1, 6)] == [2, 4, 6, 8, 10]
    assert not step.keeps_gradients
    (told,) = caplog.records
    assert told.getMessage() == (
        "CUDA graphs: none from here on (CUDA error: operation not permitted when stream is capturing); "
        "training goes on without them."
    )


def test_what_waits_is_named_before_anything_is_recorded(caplog: pytest.LogCaptureFixture):
    elsewhere, model = torch.empty(3, device="meta"), Sum()

    def work(batch: Batch) -> Outcome:
        elsewhere[torch.tensor([0])]  # a device to which the host's positions have to be copied
        return model.work(batch)

    step = GraphedStep(work, CPU, Refused)
    assert [float(step(labelled(1, value))[0]["loss"]) for value in range(1, 6)] == [2, 4, 6, 8, 10]
    assert model.calls == 5
    (told,) = caplog.records
    assert "none from here on (index at training/graphs.py:" in told.getMessage()
    assert " waits for the device); training goes on" in told.getMessage()


# ---------------------------------------------------------------------------------------------------------
# Runs


def fabric(device: torch.device = GPU, world: int = 1) -> SimpleNamespace:
    return SimpleNamespace(device=device, world_size=world, global_rank=0)


@pytest.mark.parametrize(
    ("settings", "machine", "why"),
    [
        ((), fabric(CPU), "they need a CUDA GPU, and this run is on 'cpu'"),
        ((), fabric(world=8), "they work for a single process, and this run has 8"),
        (("finetune.enabled=true",), fabric(), "finetuning takes its features from outside of the step"),
        (("model.backbone.checkpointing=true",), fabric(), "model.backbone.checkpointing asks for the state of random"),
    ],
)
def test_runs_without_graphs_say_why(settings, machine, why, caplog):
    recipe = resolve("table1/seesaw", ["training.cuda_graphs=true", *settings])
    assert why_none(recipe, machine.device, machine.world_size).startswith(why)
    assert not has_graphs(recipe, machine)
    assert cuda_graphs(recipe, machine) is None
    (told,) = caplog.records
    assert told.levelno == logging.WARNING
    assert f"CUDA graphs: none (training.cuda_graphs=true, but {why}" in told.getMessage()


def test_runs_have_graphs_if_they_are_asked_for(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    recipe = resolve("table1/seesaw")
    assert not recipe.training.cuda_graphs
    with caplog.at_level("INFO", logger="tailseg"):
        assert cuda_graphs(recipe, fabric()) is None
        assert caplog.text == ""
        asked = resolve("table1/seesaw", ["training.cuda_graphs=true"])
        assert has_graphs(asked, fabric())
        assert cuda_graphs(asked, fabric()) is not None
    assert f"recorded, up to {GRAPHS}" in caplog.text


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSplits:
    settings = SyntheticSettings(classes=4, train_images=6, val_images=2, size=64, rarest=2)
    return open_data(str(write_synthetic(tmp_path_factory.mktemp("set") / "data", settings)))


def test_a_run_with_graphs_equals_one_in_which_none_can_be_recorded(data, tmp_path, monkeypatch, caplog):
    """Accumulated, clipped and averaged, with batch norm that learns, Seesaw's counts and the log's signs."""
    settings = (
        *SMALL_RECIPE,
        "optimizer={name: sgd, lr: 0.01, clip: 10}",
        "schedule={epochs: 1, milestones: [], warmup_steps: 1}",
        "training={accumulate: 2, ema: 0.9, log_steps: 1, cuda_graphs: true}",
        "data.batch_per_device=1",
        "model.backbone.train_norm=true",
        "model.mask_head.norm=true",
    )
    monkeypatch.setattr("tailseg.data.batches.FEW_SHAPES_DIVISOR", 64)
    monkeypatch.setattr(graphs, "why_none", lambda *_: "")
    runs: list[Run] = []
    begin = Run.start

    def start(self: Run, resume: bool) -> None:
        runs.append(self)
        self.forward_backward.new_graph = lambda: CalledAgain(self.learner.trained) if len(runs) == 1 else Refused()
        self.forward_backward.watched = len(runs) > 1
        begin(self, resume)

    monkeypatch.setattr(Run, "start", start)
    monkeypatch.setattr("tailseg.training.loop.cuda_graphs", lambda *_: None)
    monkeypatch.setattr("tailseg.training.loop.Run.evaluate_if_due", lambda *_, **__: None)
    for name in ("replayed", "refused"):
        train(resolve("demo/seesaw", list(settings)), data, tmp_path / name, show=False)
    replayed, refused = runs
    assert len(replayed.forward_backward.recorded) == 1
    assert sum(replayed.forward_backward.counts.values()) == 6
    assert "none from here on" in caplog.text
    assert refused.forward_backward.recorded == {}
    one, other = tmp_path / "replayed", tmp_path / "refused"
    for file in ("last.safetensors", "trainer.safetensors"):
        tensors, expected = load_file(one / file), load_file(other / file)
        assert tensors.keys() == expected.keys()
        assert [key for key, value in tensors.items() if not torch.equal(value, expected[key])] == []
    rows = [[json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] for out in (one, other)]
    for row, expected_row in zip(*rows, strict=True):
        assert {"silent", "gradient", "mask"} <= row.keys()
        assert {**row, "images_per_second": 0} == {**expected_row, "images_per_second": 0}
