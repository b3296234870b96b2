"""The optimiser and its learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from tailseg.errors import UserError
from tailseg.model.detector import Detector
from tailseg.recipes.schema import OptimizerRecipe, ScheduleRecipe
from tailseg.training.parts import modules_of


def build_optimizer(model: nn.Module, recipe: OptimizerRecipe) -> torch.optim.Optimizer:
    """SGD or AdamW over all trainable parameters, weight decay on every one of them.

    Each part of `OptimizerRecipe.rates` is a group of its own, with the key ``scale``, the factor of its rate.

    Raises:
        UserError: the model has no such part, or all of it is frozen.
    """
    groups: list[dict[str, Any]] = []
    taken: set[nn.Parameter] = set()
    for part, scale in recipe.rates.items():
        assert isinstance(model, Detector)
        own = [p for module in modules_of(model, part, "optimizer.rates") for p in module.parameters()]
        own = [p for p in own if p.requires_grad]
        if not own:
            raise UserError(f"optimizer.rates: all of {part} is frozen; leave it out")
        taken |= set(own)
        groups.append({"params": own, "scale": scale})
    groups.insert(0, {"params": [p for p in model.parameters() if p.requires_grad and p not in taken], "scale": 1.0})
    if recipe.name == "sgd":
        return torch.optim.SGD(
            groups, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, fused=True
        )
    return torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give all groups of `build_optimizer` this learning rate, times the factor of each."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


def scaled_rate(recipe: OptimizerRecipe, images_a_step: int) -> float:
    """The base learning rate for this many images a step (linear scaling, arXiv 1706.02677)."""
    return recipe.lr * images_a_step / recipe.reference_batch


def rate_factor(step: int, steps_per_epoch: int, recipe: ScheduleRecipe) -> float:
    """Factor of the base learning rate in the step of this index (from 0): warm-up, and milestones or cosine."""
    if recipe.kind == "cosine":
        factor = (1 + math.cos(math.pi * step / (recipe.epochs * steps_per_epoch))) / 2
    else:
        factor = math.prod(recipe.gamma for m in recipe.milestones if step >= m * steps_per_epoch)
    if step < recipe.warmup_steps:
        factor *= recipe.warmup_factor + (1 - recipe.warmup_factor) * step / recipe.warmup_steps
    return factor
