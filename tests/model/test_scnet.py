"""How SCNet's heads learn: the relay reads the box head's features of the mask's own RoIs, and teaches them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import SMALL_RECIPE, noise_batch

from tailseg.errors import UserError
from tailseg.model.build import build_detector
from tailseg.recipes.resolve import resolve

SETTINGS = (
    *SMALL_RECIPE,
    "model.backbone={name: resnet18, options: {channels: [8, 16, 24, 32]}}",
    "model.mask_head={channels: 16, convs: 4}",
)


def test_the_relay_reads_what_the_box_head_saw_in_the_same_rois() -> None:
    torch.manual_seed(0)
    model = build_detector(resolve("scnet", SETTINGS), 5).train()
    assert model.relay is not None
    seen: dict[str, Any] = {}
    last = model.stages[2]
    last.sampler.register_forward_hook(lambda _module, _inputs, found: seen.update(targets=found))
    last.box_head.register_forward_hook(lambda _module, _inputs, found: seen.update(prediction=found))
    model.relay.register_forward_hook(lambda _module, inputs, found: seen.update(read=inputs[0], relayed=found))
    losses = model(noise_batch((64, 64), (64, 48), objects=4, num_classes=5, seed=1))
    assert {name for name in losses if "mask" in name or name == "context"} == {"stage3.mask", "context"}
    positive = seen["targets"].positive
    assert positive.sum() >= 7  # the objects themselves
    assert torch.equal(seen["read"], seen["prediction"].hidden[positive])
    assert seen["relayed"].shape == (positive.sum(), 16, 14, 14)

    losses["stage3.mask"].backward()
    for parameter in (model.relay.fc.weight, last.box_head.fc1.weight, model.context.convs[0].weight):
        assert parameter.grad is not None
        assert parameter.grad.any()
    assert last.box_head.classifier.weight.grad is None
    assert model.stages[0].box_head.fc1.weight.grad is None


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("model.mask_head.convs=3", "residual needs an even number of convs, received 3"),
        ("model.semantic={convs: 3, residual: true}", "residual needs an even number of convs, received 3"),
        ("model.mask_head.channels=8", "a residual mask head needs the neck's 16 channels, and .* is 8"),
        ("model.stages.0.mask_weight=1", "a feature relay serves the last mask head alone"),
        ("model.stages.2.tsd=true", "a feature relay needs a plain box head"),
        ("model.mask_head.interleaved=true", "a feature relay needs a plain box head"),
    ],
)
def test_what_does_not_go_together(setting: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        resolve("scnet", (*SETTINGS, setting))
