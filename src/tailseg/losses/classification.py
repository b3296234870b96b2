"""Classifications of a box head: the number of logits, the loss and the scores live in one object.

So every loss swaps for every other without a head knowing which it has. Shape letters: R RoIs, C classes; label C is
background. Unless a loss says otherwise it is divided by the number of valid RoIs, background included.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tailseg.losses.inputs import flat_logits, require_labels, require_shapes, whole_labels

PRIOR_01 = -4.595120  # ln(0.01 / 0.99): the bias at which a sigmoid starts at 0.01
PRIOR_001 = -6.906755  # ln(0.001 / 0.999)


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
    until a state dict is loaded, and has no loss until then. Every loss begins with `check_inputs`.
    """

    needs_statistics: ClassVar[bool] = False  # of the training annotations
    learned_buffers: ClassVar[tuple[str, ...]] = ()  # that change while it trains (counts, gradients)
    layout_buffers: ClassVar[tuple[str, ...]] = ()  # that say which logit belongs to which class
    tau_norm_applies: ClassVar[bool] = True  # the classifier has one plain row a class, in the order of the labels
    initial_bias: ClassVar[float]  # of every logit of the classifier, before training
    num_classes: int
    num_logits: int
    statistics_known: bool = True  # False: made without, and not yet seen to have been loaded

    def check_inputs(self, logits: Tensor, labels: Tensor, valid: Tensor) -> None:
        """Refuse what a loss would count or learn as something else; arguments of `loss`.

        Labels are looked at on the CPU only: elsewhere that would stall every step, and one outside [0, C] fails on
        the device or counts as background.

        Raises:
            ValueError: a shape, a type or a label is not as described, or the statistics are missing.
        """
        name, rows = type(self).__name__, logits.shape[:1]
        if logits.dim() != 2 or logits.shape[1] != self.num_logits or labels.shape != rows or valid.shape != rows:
            received = f"{tuple(logits.shape)}, {tuple(labels.shape)} and {tuple(valid.shape)}"
            raise ValueError(
                f"{name} expected logits (R, {self.num_logits}), labels (R,) and valid (R,), received {received}"
            )
        if not logits.is_floating_point() or valid.dtype != torch.bool:
            raise ValueError(f"{name} expected floating logits and bool valid, received {logits.dtype}, {valid.dtype}")
        require_labels(name, labels, self.num_classes, background=True)
        if not self.statistics_known:
            # Looked at once, whatever the device: only a loss comes here that was made without them and has loaded no
            # state dict. A compiler sees no values, and has the flag alone.
            if torch.compiler.is_compiling() or self._lacks_values():
                raise ValueError(
                    f"{name} was made without statistics; pass statistics=ClassStatistics(...) or load a state dict"
                )
            self.statistics_known = True

    def _lacks_values(self) -> bool:
        return any(bool(buffer.isnan().any()) for buffer in self.buffers() if buffer.is_floating_point())

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        super()._load_from_state_dict(*args, **options)
        if not self.statistics_known:
            self.statistics_known = not any(buffer.is_meta for buffer in self.buffers()) and not self._lacks_values()

    def forward(self, logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
        """Sum of the losses of `loss`, called as `torch.nn.functional.cross_entropy` is.

        Args:
            logits: (N, num_logits), (N, num_logits, d1, ...) or (num_logits,) float.
            labels: (N,), (N, d1, ...) or () int64 or uint8 in [0, C], C being background, or ``ignore_index``.
            ignore_index: label of samples that `loss` takes as not valid.

        Returns:
            Scalar.

        Raises:
            ValueError: a shape, a type or (on CPU) a label is not as described, or the statistics are missing.
        """
        name, labels = type(self).__name__, whole_labels(labels)
        require_shapes(name, logits, labels, self.num_logits)
        require_labels(name, labels, self.num_classes, background=True, ignore_index=ignore_index)
        valid = (labels != ignore_index).flatten()
        known = labels.flatten().where(valid, self.num_classes)
        return torch.stack(list(self.loss(flat_logits(logits), known, valid).values())).sum()

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
