"""How HTC's mask heads learn: from boxes that their own stage refined, and through each other."""

from __future__ import annotations

import pytest
import torch
from tiny import SMALL_RECIPE, noise_batch

from tailseg.errors import UserError
from tailseg.model.build import build_detector
from tailseg.model.detector import Detector
from tailseg.recipes.resolve import resolve

SETTINGS = (*SMALL_RECIPE, "model.backbone={name: resnet18, stride_in_1x1: false}", "model.mask_head.channels=16")


def detector(*settings: str) -> Detector:
    torch.manual_seed(0)
    return build_detector(resolve("htc", (*SETTINGS, *settings)), 5).train()


def test_mask_heads_learn_from_boxes_of_their_own_stage() -> None:
    model, calls, refined = detector(), [], []
    for stage in model.stages:
        stage.sampler.register_forward_pre_hook(lambda _module, inputs: calls.append(inputs[0].boxes))
    plain = model.refine_proposals
    model.refine_proposals = lambda *arguments: refined.append(plain(*arguments)) or refined[-1]  # type: ignore[func-returns-value]
    losses = model(noise_batch((64, 64), (64, 48), objects=4, num_classes=5, seed=1))
    assert {name for name in losses if name.startswith("stage3")} == {"stage3.classes", "stage3.box", "stage3.mask"}
    assert all(loss.isfinite() for loss in losses.values())
    # A stage samples boxes for its box head, then refined ones for its mask head; the next starts from those.
    assert len(calls) == 6
    assert len(refined) == 3
    for stage, boxes in enumerate(refined):
        assert torch.equal(calls[2 * stage + 1], boxes.boxes)
        if stage < 2:
            assert torch.equal(calls[2 * stage + 2], boxes.boxes)


def test_the_last_mask_loss_reaches_the_first_mask_head() -> None:
    model = detector()
    model(noise_batch((64, 64), (64, 48), objects=4, num_classes=5, seed=1))["stage3.mask"].backward()
    first, last = model.stages[0].mask_head, model.stages[2].mask_head
    assert first.flow is None
    for parameter in (first.convs[0].weight, model.stages[1].mask_head.flow.weight, last.flow.weight):
        assert parameter.grad is not None
        assert parameter.grad.any()
    assert first.predictor.weight.grad is None


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("model.mask_head.norm=true", "mask heads that are chained have no norm"),
        (
            "model.stages.1.mask_weight=0",
            "mask heads are chained from stage to stage, so each stage needs a mask_weight",
        ),
        (
            "model.mask_head.channels=8",
            "chained mask heads need the neck's 16 channels, and model.mask_head.channels is 8",
        ),
        ("model={semantic: {enabled: true}, stages: [{tsd: true}]}", "the semantic branch cannot be shifted"),
    ],
)
def test_what_does_not_go_together(setting: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        resolve("htc", (*SETTINGS, setting))
