"""The optimiser and its learning rate (spec, section 22)."""

from __future__ import annotations

import math

import torch
from torch import nn

from tailseg.recipes.schema import OptimizerRecipe, ScheduleRecipe


def build_optimizer(model: nn.Module, recipe: OptimizerRecipe) -> torch.optim.Optimizer:
    """SGD or AdamW over all trainable parameters, weight decay on every one of them."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if recipe.name == "sgd":
        return torch.optim.SGD(
            parameters, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, fused=True
        )
    return torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)


def scaled_rate(recipe: OptimizerRecipe, images_a_step: int) -> float:
    """The base learning rate for this many images a step (linear scaling, arXiv 1706.02677)."""
    return recipe.lr * images_a_step / recipe.reference_batch


def rate_factor(step: int, steps_per_epoch: int, recipe: ScheduleRecipe) -> float:
    """Factor of the base learning rate in the step of this index (from 0): warm-up, then milestones."""
    factor = math.prod(recipe.gamma for m in recipe.milestones if step >= m * steps_per_epoch)
    if step < recipe.warmup_steps:
        factor *= recipe.warmup_factor + (1 - recipe.warmup_factor) * step / recipe.warmup_steps
    return factor
