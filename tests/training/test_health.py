"""Signs of a run that goes wrong: lengths of gradients, and box heads whose hidden units are all zero."""

import logging

import pytest
import torch

from tailseg.model.box_head import BoxHead
from tailseg.model.build import build_detector
from tailseg.recipes.resolve import resolve
from tailseg.training.health import Health

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


def test_a_sound_head_is_not_silent(head: BoxHead, caplog: pytest.LogCaptureFixture) -> None:
    look(head)
    assert Health(torch.nn.Sequential(head), speaks=True).row(1) == {"silent": 0.0}
    assert caplog.text == ""


def test_a_head_whose_last_hidden_layer_is_zero_is_told_once(head: BoxHead, caplog: pytest.LogCaptureFixture) -> None:
    assert head.fc2 is not None
    torch.nn.init.constant_(head.fc2.bias, -100.0)
    look(head)
    health = Health(torch.nn.Sequential(head), speaks=True)
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
    assert Health(torch.nn.Sequential(head), speaks=False).row(1) == {"silent": 1.0}
    assert caplog.text == ""


def test_lengths_of_gradients_are_averaged_between_two_lines() -> None:
    health = Health(torch.nn.Linear(1, 1), speaks=True)
    for norm in (1.0, 2.0, 6.0):
        health.collect(torch.tensor(norm))
    assert health.row(3) == {"gradient": 3.0}
    assert health.row(6) == {}
