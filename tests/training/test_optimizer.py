import math

import pytest
import torch
from tiny import SMALL_RECIPE
from torch import nn

from tailseg.errors import UserError
from tailseg.model.build import build_detector
from tailseg.model.detector import Detector
from tailseg.recipes.resolve import resolve
from tailseg.recipes.schema import OptimizerRecipe, ScheduleRecipe
from tailseg.training.optimizer import build_optimizer, rate_factor, scaled_rate, set_rate


def test_rate_by_hand() -> None:
    # Two steps an epoch; warm-up over 4 steps from a tenth; a fifth of the rate after epochs 3 and 4.
    schedule = ScheduleRecipe(epochs=5, milestones=(3, 4), gamma=0.2, warmup_steps=4, warmup_factor=0.1)
    found = [rate_factor(step, 2, schedule) for step in range(10)]
    assert found == pytest.approx([0.1, 0.325, 0.55, 0.775, 1, 1, 0.2, 0.2, 0.04, 0.04], abs=1e-12)


def test_warm_up_reaches_over_a_milestone_and_may_be_absent() -> None:
    schedule = ScheduleRecipe(epochs=2, milestones=(1,), gamma=0.1, warmup_steps=4, warmup_factor=0.5)
    assert [rate_factor(s, 2, schedule) for s in range(4)] == pytest.approx([0.5, 0.625, 0.075, 0.0875], abs=1e-12)
    none = ScheduleRecipe(epochs=2, milestones=(), warmup_steps=0)
    assert [rate_factor(s, 2, none) for s in range(4)] == [1, 1, 1, 1]


def test_1x_schedule_of_the_report() -> None:
    """Spec, section 22: 6,212 steps an epoch, warm-up 500 from 0.001, steps after epochs 8 and 11."""
    schedule = resolve("table1/seesaw").schedule
    epoch = 6212
    expected = {
        0: 0.001,
        250: 0.5005,
        500: 1.0,
        8 * epoch - 1: 1.0,
        8 * epoch: 0.1,
        11 * epoch - 1: 0.1,
        11 * epoch: 0.01,
        12 * epoch - 1: 0.01,
    }
    assert {step: rate_factor(step, epoch, schedule) for step in expected} == pytest.approx(expected, rel=1e-12)


def test_linear_scaling() -> None:
    recipe = OptimizerRecipe(lr=0.02, reference_batch=16)
    assert scaled_rate(recipe, 16) == 0.02
    assert scaled_rate(recipe, 2) == 0.0025
    assert scaled_rate(recipe, 64) == 0.08


def toy() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))
    nn.init.constant_(model[0].weight, 2.0)
    model[0].bias.requires_grad_(False)
    return model


def set_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)


def test_sgd_takes_the_steps_of_its_formula() -> None:
    model = toy()
    optimizer = build_optimizer(model, OptimizerRecipe(name="sgd", lr=0.1, momentum=0.9, weight_decay=0.5))
    weight, speed = 2.0, 0.0
    for _ in range(3):
        set_gradients(model)
        optimizer.step()
        speed = 0.9 * speed + (1 + 0.5 * weight)
        weight -= 0.1 * speed
        torch.testing.assert_close(model[0].weight, torch.full((1, 2), weight))
    # The decay is on norms too, and what is frozen is not touched.
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 3
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.5}


def test_adamw_takes_the_first_step_of_its_formula() -> None:
    model = toy()
    optimizer = build_optimizer(model, OptimizerRecipe(name="adamw", lr=0.1, weight_decay=0.5))
    set_gradients(model)
    optimizer.step()
    # The first step is the sign of the gradient; the decay is decoupled (arXiv 1711.05101).
    torch.testing.assert_close(model[0].weight, torch.full((1, 2), 2.0 * (1 - 0.1 * 0.5) - 0.1))
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.5}


def test_cosine_by_hand() -> None:
    # Four epochs of two steps: half a cosine over eight steps, under a warm-up of two from a half.
    schedule = ScheduleRecipe(epochs=4, kind="cosine", milestones=(), warmup_steps=2, warmup_factor=0.5)
    found = [rate_factor(step, 2, schedule) for step in range(9)]
    half = [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(9)]
    assert found == pytest.approx([0.5, 0.75 * half[1], *half[2:8], 0], abs=1e-12)
    assert half[4] == pytest.approx(0.5)
    with pytest.raises(UserError, match=r"set schedule.milestones=\[\]"):
        resolve("table1/seesaw", ["schedule.kind=cosine"])


def detector(*settings: str) -> Detector:
    return build_detector(resolve("demo/seesaw", [*SMALL_RECIPE, *settings]), 4)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_rates_of_parts(name: str) -> None:
    """One step with equal gradients: its length is the rate of the parameter's part."""
    rates = {"backbone": 0.1, "box_heads": 2.0}
    settings = {"name": name, "lr": 0.01, "weight_decay": 0.0}
    torch.manual_seed(0)
    model = detector("model.stages=[{weight: 1}, {weight: 0.5}]")
    before = {key: value.clone() for key, value in model.named_parameters()}
    optimizer = build_optimizer(model, OptimizerRecipe(**settings, rates=rates))
    assert sorted(id(p) for group in optimizer.param_groups for p in group["params"]) == sorted(
        id(p) for p in model.parameters() if p.requires_grad
    )
    set_rate(optimizer, 0.02)
    set_gradients(model)
    optimizer.step()
    steps = {key: (before[key] - p).flatten()[0].item() for key, p in model.named_parameters() if p.requires_grad}
    for key, step in steps.items():
        part = "backbone" if key.startswith("backbone.") else "box_heads" if ".box_head." in key else "others"
        assert step == pytest.approx(0.02 * {**rates, "others": 1.0}[part], rel=2e-3), key
    assert {".box_head." in key for key in steps} == {True, False}


def test_parts_that_have_no_rate() -> None:
    with pytest.raises(UserError, match=r"optimizer.rates: this model has no part context; leave it out"):
        build_optimizer(detector(), OptimizerRecipe(rates={"context": 0.1}))
    frozen = detector()
    frozen.rpn.requires_grad_(False)
    with pytest.raises(UserError, match=r"optimizer.rates: all of rpn is frozen"):
        build_optimizer(frozen, OptimizerRecipe(rates={"rpn": 0.1}))
    with pytest.raises(UserError, match=r"finetune.enabled trains its own branches alone; leave out optimizer.rates"):
        resolve("demo/seesaw", ["finetune.enabled=true", "optimizer.rates={rpn: 0.1}"])
    with pytest.raises(UserError, match="'backbone', 'neck', 'rpn', "):
        resolve("demo/seesaw", ["training.freeze=[body]"])
