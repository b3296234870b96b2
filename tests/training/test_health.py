"""Signs of a run that goes wrong: long gradients, silent box heads, proposals without objects, losses that stay."""

import logging

import pytest
import torch

from tailseg.model.box_head import BoxHead
from tailseg.model.build import build_detector
from tailseg.recipes.resolve import resolve
from tailseg.structures import Proposals
from tailseg.training.health import Health, LossWatch

CHANGES = ("model.backbone.pretrained=false", "model.neck.channels=4", "model.box_head.width=6")


@pytest.fixture
def head() -> BoxHead:
    torch.manual_seed(0)
    detector = build_detector(resolve("demo/seesaw", CHANGES), num_classes=3)
    (found,) = [module for module in detector.modules() if isinstance(module, BoxHead)]
    return found.train()


def look(head: BoxHead, rois: int = 10) -> None:
    maps = torch.rand(rois, 4, 7, 7)
    head(lambda _rois, _shifts=None: maps, torch.zeros(rois, 5))


def of(head: BoxHead, *, speaks: bool) -> Health:
    """Health that was given the signs of the last forward pass."""
    health = Health(torch.nn.Sequential(head), speaks=speaks)
    health.add(health.taken())
    assert head.silent is None
    return health


def test_a_sound_head_is_not_silent(head: BoxHead, caplog: pytest.LogCaptureFixture) -> None:
    look(head)
    assert of(head, speaks=True).row(1) == {"silent": 0.0}
    assert caplog.text == ""


def test_a_head_whose_last_hidden_layer_is_zero_is_told_once(head: BoxHead, caplog: pytest.LogCaptureFixture) -> None:
    assert head.fc2 is not None
    torch.nn.init.constant_(head.fc2.bias, -100.0)
    look(head)
    health = of(head, speaks=True)
    assert health.row(160) == {"silent": 1.0}
    assert health.row(180) == {"silent": 1.0}
    (told,) = caplog.records
    assert told.levelno == logging.WARNING
    assert "Step 160: a box head has died: for 100 % of the RoIs" in told.getMessage()
    assert "lower optimizer.lr, raise schedule.warmup_steps or set optimizer.clip" in told.getMessage()


def test_the_share_is_that_of_rois_without_an_active_unit(head: BoxHead) -> None:
    assert head.fc2 is not None
    with torch.no_grad():
        head.fc1.weight.copy_(head.fc1.weight.abs())
        head.fc2.weight.copy_(head.fc2.weight.abs())
    maps = torch.cat([torch.ones(3, 4, 7, 7), torch.zeros(1, 4, 7, 7)])
    head(lambda _rois, _shifts=None: maps, torch.zeros(4, 5))
    assert head.silent is not None
    assert head.silent.item() == 0.25


def test_only_one_process_speaks_and_evaluation_leaves_no_trace(
    head: BoxHead, caplog: pytest.LogCaptureFixture
) -> None:
    assert head.fc2 is not None
    torch.nn.init.constant_(head.fc2.bias, -100.0)
    look(head.eval())
    assert head.silent is None
    look(head.train())
    assert of(head, speaks=False).row(1) == {"silent": 1.0}
    assert caplog.text == ""


def test_lengths_of_gradients_are_averaged_between_two_lines() -> None:
    health = Health(torch.nn.Linear(1, 1), speaks=True)
    for norm in (1.0, 2.0, 6.0):
        health.collect(torch.tensor(norm))
    assert health.row(3) == {"gradient": 3.0}
    assert health.row(6) == {}


# ---------------------------------------------------------------------------------------------------------
# Proposals that meet no object


class Fixed(torch.nn.Module):
    """An RPN's anchors and a sampler, whose targets the test sets."""

    def __init__(self, anchor_scale: float = 8.0) -> None:
        super().__init__()
        changes = (*CHANGES, f"model.rpn.anchor_scale={anchor_scale}")
        detector = build_detector(resolve("demo/seesaw", changes), num_classes=3)
        self.rpn = detector.rpn
        self.sampler = detector.stages[0].sampler  # type: ignore[union-attr]

    def batch(self, side: float, *, found: bool) -> None:
        """One object of this side, its own box among the RoIs; with ``found`` a proposal lies on it too."""
        objects = torch.tensor([[[10.0, 10.0, 10.0 + side, 10.0 + side]]])
        elsewhere = torch.tensor([[[300.0, 300.0, 340.0, 340.0]]])
        boxes = objects + 0.01 * side if found else elsewhere
        proposals = Proposals(boxes=boxes, scores=torch.ones(1, 1), valid=torch.ones(1, 1, dtype=torch.bool))
        self.sampler(proposals, objects, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool))


@pytest.mark.parametrize(
    ("side", "fix"),
    [
        (6.0, "raise data.short_edges and data.long_edge, or lower model.rpn.anchor_scale."),
        (60.0, "these fit, so look at the boxes with `tailseg data check`"),
        (2000.0, "lower data.short_edges, or raise model.rpn.anchor_scale."),
    ],
)
def test_no_positive_rois_are_told_once_with_the_sizes(side: float, fix: str, caplog: pytest.LogCaptureFixture) -> None:
    model = Fixed().train()
    health = Health(model, speaks=True)
    for step in range(1, 300):
        model.batch(side, found=False)
        health.add(health.taken())
        if step % 20 == 0:
            health.row(step)
    (told,) = caplog.records
    message = told.getMessage()
    assert message.startswith("Step 100: in 100 batches no proposal overlapped an object by 0.5 or more")
    assert f"objects are {side:.0f} pixels wide on average as the network sees them, anchors 32 to 512;" in message
    assert fix in message


def test_a_single_proposal_that_meets_an_object_is_enough(caplog: pytest.LogCaptureFixture) -> None:
    model = Fixed().train()
    health = Health(model, speaks=True)
    for step in range(1, 180):
        model.batch(20.0, found=step == 90)
        health.add(health.taken())
        if step % 10 == 0:
            health.row(step)
    assert caplog.text == ""


def test_proposals_are_watched_in_training_and_by_one_process(caplog: pytest.LogCaptureFixture) -> None:
    model = Fixed().train()
    silent = Health(model, speaks=False)
    for _ in range(120):
        model.batch(6.0, found=False)
        silent.add(silent.taken())
    silent.row(120)
    model.eval()
    watching = Health(model, speaks=True)
    for _ in range(120):
        model.batch(6.0, found=False)
        watching.add(watching.taken())
    watching.row(240)
    assert caplog.text == ""


# ---------------------------------------------------------------------------------------------------------
# Losses that do not fall


def lines(watch: LossWatch, *rows: dict[str, float], every: int = 10) -> None:
    for number, row in enumerate(rows, start=1):
        watch.look(number * every, row, 0.02)


def test_a_loss_that_has_not_fallen_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    watch = LossWatch(steps=200, warmup=50, trained=False, speaks=True)
    lines(watch, *[{"classes": 3.0 + 0.01 * (n % 3), "mask": 0.7} for n in range(40)])
    (told,) = caplog.records
    assert told.getMessage().startswith(
        "Step 200: the loss has not fallen: 3.705 in the first 20 steps, 3.705 in the last 20; most likely "
        "optimizer.lr = 0.02 is far too low or too high: try a tenth and ten times of it"
    )


def test_losses_that_fall_are_sound(caplog: pytest.LogCaptureFixture) -> None:
    watch = LossWatch(steps=200, warmup=0, trained=False, speaks=True)
    lines(watch, *[{"classes": 3.0 - 0.01 * n, "mask": 0.7} for n in range(20)])
    assert caplog.text == ""


def test_a_sum_may_rise_where_a_third_of_the_losses_fall(caplog: pytest.LogCaptureFixture) -> None:
    """With Seesaw Loss there are at first few positives, whose losses are small; that of the RPN falls."""
    watch = LossWatch(steps=200, warmup=0, trained=False, speaks=True)
    lines(watch, *[{"classes": 0.1 + 0.05 * n, "box": 0.01 * n, "rpn": 0.69 - 0.02 * n} for n in range(20)])
    assert caplog.text == ""


@pytest.mark.parametrize(("end", "told"), [(1.1, False), (1.3, True)])
def test_from_a_trained_model_a_loss_need_not_fall_but_may_not_rise(
    end: float, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    watch = LossWatch(steps=200, warmup=0, trained=True, speaks=True)
    lines(watch, *[{"classes": 1.0 if n < 10 else end} for n in range(20)])
    assert bool(caplog.records) is told


def test_a_short_epoch_and_the_warm_up_are_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    lines(LossWatch(steps=10, warmup=0, trained=False, speaks=True), *[{"classes": 1.0}] * 9)
    lines(LossWatch(steps=100, warmup=100, trained=False, speaks=True), *[{"classes": 1.0}] * 19)
    assert caplog.text == ""


def test_a_resumed_run_and_other_processes_do_not_compare(caplog: pytest.LogCaptureFixture) -> None:
    resumed = LossWatch(steps=100, warmup=0, trained=False, speaks=True)
    for step in range(60, 200, 10):
        resumed.look(step, {"classes": 1.0}, 0.02)
    lines(LossWatch(steps=100, warmup=0, trained=False, speaks=False), *[{"classes": 1.0}] * 20)
    assert caplog.text == ""
