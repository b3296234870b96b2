"""A row of Table 2 in two processes (gloo): whole runs, and steps equal to those of one process with the joint batch.

Run with the arguments FOLDER DATA start this file is one of two processes that take a few steps, and then train a
row with the real command; with ``resume`` another two go on with these runs. What each of them has computed and said
is left in FOLDER. Few processes do it all: to start one takes longer than its work.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file
from tiny import SMALL_RECIPE, Done, options, run_together, tailseg
from torch import Tensor

from tailseg.data.sources import open_data
from tailseg.data.synthetic.generate import SyntheticSettings, write_synthetic
from tailseg.model import box_head, rpn
from tailseg.model.build import build_detector
from tailseg.model.detector import Detector
from tailseg.model.matching import Sampled
from tailseg.recipes.resolve import resolve
from tailseg.structures import Batch, Proposals
from tailseg.training import loop
from tailseg.training.distributed import launch
from tailseg.training.loop import Run

CLASSES, IMAGES, OBJECTS, STEPS = 4, 8, 3, 3
KINDS = ("whole", "without-positives")
TINY = (
    *SMALL_RECIPE,
    "model.backbone.name=tf_efficientnet_lite2",  # the row's own
    "model.box_head.rois=16",
    f"model.box_head.max_positive={OBJECTS}",
    "model.mask_head.convs=2",
    "optimizer={lr: 0.001, reference_batch: 4, clip: 1}",
    "schedule={epochs: 1, milestones: [], warmup_steps: 0}",
    "training.log_steps=1",
    "training.validation_loss=true",
    "training.loggers=[csv]",
)
# From row 8 on, in whole runs: each batch norm of a pathway waits for the other process twice a step.
NARROW_NECK = ("model.neck.pathways=2",)
SMALL_VIEWS = ("data.long_edges=[40, 90]", "data.crop=64")  # from row 7 on


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = SyntheticSettings(classes=CLASSES, train_images=IMAGES, val_images=2, size=64, rarest=3)
    return write_synthetic(tmp_path_factory.mktemp("set") / "data", settings)


# ---------------------------------------------------------------------------------------------------------
# The real command

ROW = "10-seesaw"  # with all that the rows before it synchronise
EPOCH, LONGER = IMAGES // 4, ("schedule.epochs=2",)


def train(row: str, data: Path, out: Path, devices: int, settings: tuple[str, ...] = (), *more: str) -> Done:
    own = (*TINY, *((*SMALL_VIEWS, *NARROW_NECK) if row == ROW else ()), *settings)
    arguments = ("train", f"demo-table2/{row}", "--data", data, "--out", out, "--devices", devices)
    return tailseg(*arguments, *options(own), *more)


def runs(folder: Path, data: Path, *, resume: bool) -> list[tuple[str, int, str]]:
    """A run of one epoch and one of two, or the former's second; their names, exit codes and stderr."""
    found = []
    started = {"parts": ((),), "whole": (LONGER,)}
    resumed = {"parts": (LONGER, "--resume")}  # for an epoch more than it was to have
    for name, arguments in (resumed if resume else started).items():
        done = train(ROW, data, folder / name, 2, *arguments)
        found.append((name, done.returncode, done.stderr))
    return found


def test_runs_of_two_processes_are_resumed_exactly(launched: Path) -> None:
    whole, parts = launched / "whole", launched / "parts"
    said = {}
    for what in ("start", "resume"):
        for rank in (0, 1):
            for name, code, errors in json.loads((launched / f"{what}-{rank}.json").read_text()):
                assert code == 0, errors
                said[what, name] = said.get((what, name), "") + errors
    synchronized = "learn their statistics from all 2 processes (SyncBN)."
    assert said["start", whole.name].count(synchronized) == 1
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 2 * EPOCH + 1))
    assert all(math.isfinite(row["loss"]) for row in rows if "loss" in row)
    # Both measure their share of the validation images; one of them logs.
    (losses,) = (row["validation"] for row in rows if "metrics" in row)
    assert losses["loss"] == pytest.approx(sum(value for name, value in losses.items() if name != "loss"))
    assert len((whole / "csv" / "metrics.csv").read_text().splitlines()) == 1 + 2 * EPOCH + 1  # with a head
    assert f"from step {EPOCH} on" in said["resume", parts.name]
    for name in ("last.safetensors", "trainer.safetensors"):
        ours, theirs = load_file(parts / name), load_file(whole / name)
        assert ours.keys() == theirs.keys()
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def test_one_process_says_that_the_statistics_are_its_own(data: Path, tmp_path: Path) -> None:
    done = train("02-sync-bn", data, tmp_path / "run", 1)
    assert done.returncode == 0, done.stderr
    assert "learn their statistics, from this process alone (SyncBN needs several)." in done.stderr


# ---------------------------------------------------------------------------------------------------------
# Steps of row 10: two processes with half a batch each, one with all of it

# Losses are means over the RoIs, positives and anchors of a process, so that their mean over processes is that of the
# joint batch if every image has as many. That is so with three objects an image and three positives (the objects
# themselves at least), 16 RoIs and 256 anchors; all are drawn by place, and the proposals do not depend on scores,
# whose last digits, and with them the order, depend on the size of the batch.


def scene(step: int, kind: str) -> Batch:
    """Four images of 64 x 64 pixels; in the second kind the last two hold nothing."""
    generator = torch.Generator().manual_seed(step)
    corners = torch.rand(4, OBJECTS, 2, generator=generator) * 30
    boxes = torch.cat([corners, corners + 12 + 20 * torch.rand(4, OBJECTS, 2, generator=generator)], dim=2)
    masks = torch.zeros(4, OBJECTS, 28, 28, dtype=torch.uint8)
    masks[..., 3:23, 5:26] = 255
    valid = torch.ones(4, OBJECTS, dtype=torch.bool)
    if kind == "without-positives":
        valid[2:] = False
    sizes = torch.tensor([64, 64]).expand(4, 2)
    return Batch(
        images=torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=generator),
        image_sizes=sizes,
        original_sizes=sizes,
        image_ids=torch.arange(4),
        boxes=boxes,
        labels=torch.randint(0, CLASSES, (4, OBJECTS), generator=generator),
        valid=valid,
        masks=masks,
        mask_frames=boxes,
        absent=torch.zeros(4, CLASSES, dtype=torch.bool),
        ignored=torch.zeros(4, 0, 0, dtype=torch.uint8),
    )


def part(batch: Batch, rows: slice) -> Batch:
    return Batch(**{name: getattr(batch, name)[rows] for name in Batch.__dataclass_fields__})


def by_place(matched: Tensor, slots: int, max_positive: int) -> Sampled:
    """In place of `matching.sample`: of positives and of negatives the last, later objects first."""
    place = torch.arange(matched.shape[1])
    order = torch.where(matched >= 0, place, -1)
    front, index = order.topk(max_positive)
    back, others = torch.where(matched == -1, place, -1).topk(slots)
    places = torch.cat([index, others], dim=1)
    kind = torch.cat([2 * (front >= 0).long(), (back >= 0).long()], dim=1)
    chosen = kind.argsort(dim=1, descending=True, stable=True)[:, :slots]
    index, rank = places.gather(1, chosen), kind.gather(1, chosen)
    own = torch.where(rank == 2, matched.gather(1, index), 0)
    return Sampled(index=index, matched=own, positive=rank == 2, valid=rank > 0)


def same_proposals(images: Tensor) -> Proposals:
    """Twenty boxes all over each image, whatever the RPN says."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(20, 2, generator=generator) * 40
    boxes = torch.cat([corners, corners + 8 + 16 * torch.rand(20, 2, generator=generator)], dim=1)
    shape = (len(images), 20)
    return Proposals(boxes=boxes.expand(*shape, 4), scores=torch.zeros(shape), valid=torch.ones(shape).bool())


def finer(*arguments: Any) -> Detector:
    """The detector with backbone and neck in float64, so that the size of a batch turns no ReLU on or off there."""
    detector = build_detector(*arguments)
    detector.backbone.double().register_forward_pre_hook(lambda _module, inputs: (inputs[0].double(),))
    detector.neck.double().register_forward_hook(lambda _module, _inputs, maps: [each.float() for each in maps])
    return detector


Found = list[dict[str, dict[str, Tensor]]]  # of each step: losses, gradients, state


def steps(fabric: Fabric, folder: Path, data: Path) -> dict[str, Found]:
    """Three steps of each kind as `train` takes them."""
    rank, each = fabric.global_rank, 4 // fabric.world_size
    own = ("model.backbone.frozen_stages=2", f"data.batch_per_device={each}")  # frozen as in the recipe
    recipe = resolve("demo-table2/10-seesaw", [*TINY, *SMALL_VIEWS, *own])
    splits, results = open_data(str(data)), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rpn, "sample", by_place)
        patch.setattr(box_head, "sample", by_place)
        patch.setattr(loop, "build_detector", finer)
        for kind in KINDS:
            run = Run(fabric, recipe, splits, folder / kind, 0)
            run.detector.rpn.propose = lambda _output, image_sizes, **_: same_proposals(image_sizes)
            results[kind] = watch(run)
            run.start(resume=False)
            for step in range(STEPS):
                run.train_step(iter([part(scene(step, kind), slice(rank * each, (rank + 1) * each))]))
                results[kind][-1]["state"] = detached(run.detector.state_dict())
    return results


def watch(run: Run) -> Found:
    """A list that grows by the losses and gradients of each step."""
    found: Found = []
    run.detector.register_forward_hook(lambda _module, _inputs, losses: found.append({"losses": detached(losses)}))

    def before_step(*_: Any) -> None:
        parameters = run.detector.named_parameters()
        found[-1]["gradients"] = detached({name: p.grad for name, p in parameters if p.grad is not None})

    run.optimizer.optimizer.register_step_pre_hook(before_step)
    return found


def detached(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def launched(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes, and then another two, have left all that they do in these tests."""
    folder = tmp_path_factory.mktemp("of-2")
    for what in ("start", "resume"):
        arguments = (folder, data, what)
        assert run_together(__file__, arguments, arguments, linked=True) == [0, 0]
    return folder


@pytest.fixture(scope="module")
def results(data: Path, launched: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Found]]:
    """What each of two processes found in its steps, then what one found, by kind."""
    both = [torch.load(launched / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    return [*both, steps(launch(1), tmp_path_factory.mktemp("of-1"), data)]


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], names: list[str]) -> None:
    """Integers are equal, others within 1e-5 of the tensor's largest value, or of 1e-3 where all are smaller."""
    assert names
    for name in names:
        value = theirs[name]
        scale = max(value.abs().max().item(), 1e-3) if value.is_floating_point() else 0
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}")


def counted(state: dict[str, Tensor]) -> list[str]:
    return [name for name in state if name.endswith((".running_mean", ".running_var", "_tracked", ".counts"))]


def test_halves_learn_what_the_whole_learns(results: list[dict[str, Found]]) -> None:
    first, second, whole = (found["whole"] for found in results)
    for ours, theirs, joint in zip(first, second, whole, strict=True):
        means = {name: (loss + theirs["losses"][name]) / 2 for name, loss in ours["losses"].items()}
        assert_close(means, joint["losses"], list(means))
        assert_close(ours["gradients"], joint["gradients"], list(joint["gradients"]))
        assert_close(ours["state"], joint["state"], list(joint["state"]))
    state = whole[-1]["state"]
    assert [int(v.sum()) for k, v in state.items() if k.endswith(".counts")] == [STEPS * 4 * OBJECTS] * 3
    assert all(not torch.equal(state[k], whole[0]["state"][k]) for k in counted(state) if "mask_head" in k)


def test_processes_hold_the_same(results: list[dict[str, Found]]) -> None:
    for kind in KINDS:
        for ours, theirs in zip(results[0][kind], results[1][kind], strict=True):
            for what in ("gradients", "state"):
                assert ours[what].keys() == theirs[what].keys()
                assert [k for k, v in ours[what].items() if not torch.equal(v, theirs[what][k])] == []


def test_a_process_without_positives_takes_part(results: list[dict[str, Found]]) -> None:
    """The masks and their statistics are then those of the other process, whose positives are all there are."""
    ours, theirs, joint = (found["without-positives"][0] for found in results)
    own = {name: loss for name, loss in ours["losses"].items() if name in ("stage3.mask", "stage3.mask_iou")}
    assert_close(own, {name: joint["losses"][name] for name in own}, list(own))
    assert [theirs["losses"][name].item() for name in own] == [0, 0]
    assert_close(ours["state"], joint["state"], counted(joint["state"]))
    assert len(results[1]["without-positives"]) == STEPS
    assert all(v.isfinite().all() for v in results[1]["without-positives"][-1]["gradients"].values())


def one_of_two(folder: Path, data: Path, what: str) -> None:
    torch.set_num_threads(1)
    fabric = launch(2)  # the commands find the processes started
    if what == "start":
        torch.save(steps(fabric, folder, data), folder / f"{fabric.global_rank}.pt")
    said = runs(folder, data, resume=what == "resume")
    (folder / f"{what}-{fabric.global_rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    one_of_two(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
