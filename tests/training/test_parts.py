"""Parts of a detector, and what freezing one leaves."""

import pytest
import torch
from tiny import SMALL_RECIPE, noise_batch

from tailseg.errors import UserError
from tailseg.model.build import build_detector
from tailseg.recipes.resolve import resolve
from tailseg.training.parts import freeze, modules_of

PARTS = ("backbone", "neck", "rpn", "context", "box_heads", "mask_heads", "mask_iou")


def test_the_parts_are_all_of_a_detector():
    recipe = resolve("demo-table2/06-mask-scoring", SMALL_RECIPE)
    with torch.device("meta"):
        detector = build_detector(recipe, 4)
    owners = [id(p) for part in PARTS for module in modules_of(detector, part, "key") for p in module.parameters()]
    assert len(owners) == len(set(owners))
    assert set(owners) == {id(p) for p in detector.parameters()}


def test_a_part_that_is_not_there():
    detector = build_detector(resolve("demo/seesaw", SMALL_RECIPE), 4)
    with pytest.raises(UserError, match=r"training.freeze: this model has no part mask_iou; leave it out"):
        freeze(detector, ["mask_iou"])
    with pytest.raises(UserError, match="is all that could be trained"):
        freeze(detector, ["backbone", "neck", "rpn", "box_heads", "mask_heads"])


def test_frozen_parts_get_no_gradient():
    detector = build_detector(resolve("demo/seesaw", SMALL_RECIPE), 4)
    modules = freeze(detector, ["backbone", "rpn"])
    assert modules == [detector.backbone, detector.rpn]
    sum(
        detector(noise_batch((64, 64), (64, 48), objects=3, num_classes=4, seed=0, corner=20, sides=(12, 30))).values()
    ).backward()
    got = {name.split(".")[0] for name, p in detector.named_parameters() if p.grad is not None}
    assert got == {"neck", "stages"}
