"""The moving average of a run's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from tailseg.training.learner import copy_values


class MovingAverage(AveragedModel):
    """Weights a_1 = w_1 and a_t = d a_(t-1) + (1 - d) w_t after step t, with the buffers of the model.

    PyTorch's class, whose state it has, asks in every step a tensor on the host how many steps there were, for which a
    GPU waits, walks over all modules, and copies buffers one by one.

    Args:
        model: whose weights are averaged, on its device; it must keep its parameters and buffers.
        decay: d.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self.share = 1 - decay
        self.averaged: list[Tensor] = list(self.module.parameters())
        self.weights: list[Tensor] = list(model.parameters())
        self.buffers_here, self.buffers_there = list(self.module.buffers()), list(model.buffers())

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of one more step."""
        if self.n_averaged == 0:
            copy_values(self.weights, self.averaged)
        else:
            torch._foreach_lerp_(self.averaged, self.weights, self.share)
        copy_values(self.buffers_there, self.buffers_here)
        self.n_averaged += 1
