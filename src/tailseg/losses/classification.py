"""Classifications of a box head: the number of logits, the loss and the scores live in one object.

So every loss swaps for every other without a head knowing which it has. Shape letters: R RoIs, C classes; label C is
background. Unless a loss says otherwise it is divided by the number of valid RoIs, background included (spec,
sections 9 and 11).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

PRIOR_001 = -6.906755  # ln(0.001 / 0.999): the bias at which a sigmoid starts at 0.001 (spec, section 9)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClassStatistics:
    """Class statistics of the training set.

    Raises:
        ValueError: the two counts are not of one shape (C,), or there are no images.
    """

    num_images: int  # training images
    images: Tensor  # (C,) int64, of them those with the class
    instances: Tensor  # (C,) int64, annotated objects of the class

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise ValueError(f"expected statistics of at least 1 image, received {self.num_images}")
        if self.images.dim() != 1 or self.images.shape != self.instances.shape:
            raise ValueError(
                "expected images and instances of one shape (C,), "
                f"received {tuple(self.images.shape)} and {tuple(self.instances.shape)}"
            )


class Classification(nn.Module):
    """Base of all ways to learn classes.

    All are made as ``Kind(num_classes, *, statistics=None, **options)`` or, where nothing about the data has to be
    known, ``Kind(num_classes, **options)``. One made without the statistics that it needs holds NaN in their place
    until a state dict is loaded.
    """

    needs_statistics: ClassVar[bool] = False  # of the training annotations
    learned_buffers: ClassVar[tuple[str, ...]] = ()  # that change while it trains (counts, gradients)
    layout_buffers: ClassVar[tuple[str, ...]] = ()  # that say which logit belongs to which class
    tau_norm_applies: ClassVar[bool] = True  # the classifier has one plain row a class, in the order of the labels
    initial_bias: ClassVar[float]  # of every logit of the classifier, before training
    num_classes: int
    num_logits: int

    def loss(self, logits: Tensor, labels: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """Named scalar losses of logits (R, num_logits), labels (R,) in [0, C] and valid (R,) bool."""
        raise NotImplementedError

    def scores(self, logits: Tensor) -> Tensor:
        """Scores (R, C + 1) in [0, 1] of logits (R, num_logits), background last (0 where a loss has none)."""
        raise NotImplementedError


@contextmanager
def frozen_statistics(classification: Classification) -> Iterator[None]:
    """Compute losses without updating running statistics (counts, gradients).

    For a second branch that a step trains on the same RoIs.
    """
    modes = [(module, module.training) for module in classification.modules()]
    classification.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def at_least_float32(logits: Tensor) -> Tensor:
    """The logits in float32, or in float64 if they are: what losses are computed in, also under autocast."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def mean_over_valid(losses: Tensor, valid: Tensor) -> Tensor:
    """Sum of losses (R,) over valid RoIs (R,), divided by their number (at least 1).

    Multiplied and not selected: a loss that is not a number is to be seen, not dropped.
    """
    return (losses * valid).sum() / valid.sum().clamp(min=1)


def one_hot(labels: Tensor, width: int) -> Tensor:
    """(R, width) float32, 1 at the label; a row of zeros where the label is no column (background among C classes)."""
    return (labels.unsqueeze(1) == torch.arange(width, device=labels.device)).float()
