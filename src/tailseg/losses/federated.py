"""Federated loss: each step teaches a few classes, those present and a random draw.

Of arXiv 2103.07461, in the form of detectron2.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tailseg.losses.classification import (
    PRIOR_01,
    Classification,
    ClassStatistics,
    at_least_float32,
    mean_over_valid,
    one_hot,
)
from tailseg.losses.fused import binary_entropies, may_fuse, with_gradient


class FederatedClassification(Classification):
    """One sigmoid a class, of which a step counts only some (C logits, no logit of background).

    Those are the classes of the step's valid RoIs and, as far as they and background (if present) are fewer than
    ``sampled``, others drawn without replacement with probability proportional to images^power. So a rare class that
    is absent is seldom pushed down. Each process draws its own, with torch's own generator of the logits' device.

    Args:
        num_classes: C.
        statistics: of the training annotations; classes are drawn by their images.
        sampled: classes of a step, background included; if more are present, all of these count.
        power: exponent of the number of images; 0 draws all classes alike.

    Raises:
        ValueError: the statistics are of another number of classes, or an argument is negative.
    """

    # As in detectron2, and not the 0.001 of losses over all C: a RoI meets some 50 sigmoids, so the
    # negatives of a fresh classifier still add up to no more than half a nat, and positives are not as rare.
    needs_statistics = True
    initial_bias = PRIOR_01
    weights: Tensor  # (C,) float32, of the draw; NaN while nothing is known of the data

    def __init__(
        self, num_classes: int, *, statistics: ClassStatistics | None = None, sampled: int = 50, power: float = 0.5
    ) -> None:
        super().__init__()
        self.statistics_known = statistics is not None
        if sampled < 0 or power < 0:
            raise ValueError(f"expected sampled and power of at least 0, received {sampled}, {power}")
        self.num_classes = num_classes
        self.num_logits = num_classes
        self.sampled = sampled
        weights = torch.full((num_classes,), torch.nan)
        if statistics is not None:
            if len(statistics.images) != num_classes:
                raise ValueError(f"expected statistics of {num_classes} classes, received {len(statistics.images)}")
            weights = statistics.images.float().pow(power)
        self.register_buffer("weights", weights)

    def draw(self, labels: Tensor, valid: Tensor) -> Tensor:
        """Classes that a step counts.

        Args:
            labels: (R,) int64 in [0, C].
            valid: (R,) bool.

        Returns:
            (C,) float32, 1 for classes that count, else 0; NaN where a weight is.
        """
        present = self.weights.new_zeros(self.num_classes + 1).index_add(0, labels, valid.to(self.weights.dtype)) > 0
        wanted = self.sampled - present.sum()
        present = present[:-1]
        # The largest of weight / Exp(1) are a draw without replacement, one after the other, in proportion to the
        # weights (Gumbel top-k without its logarithms), and nothing has to leave the device. Exp(1) is never 0.
        keys = (self.weights / torch.empty_like(self.weights).exponential_()).masked_fill(present, 0.0)
        ranks = keys.argsort(descending=True).argsort()
        # A weight that is not a number is to be seen in the loss, so it is carried along.
        return (present | ((ranks < wanted) & (keys > 0))) + 0 * self.weights

    def loss(self, logits: Tensor, labels: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """Binary cross-entropies of a RoI, summed over the classes that count; their mean over valid RoIs."""
        self.check_inputs(logits, labels, valid)
        logits = at_least_float32(logits)
        drawn = self.draw(labels, valid)
        if may_fuse(logits):
            found = binary_entropies(logits, labels, drawn, drawn, valid)
            losses = with_gradient(logits, found.losses, found.gradient, lambda z: self._losses(z, labels, drawn))
        else:
            losses = self._losses(logits, labels, drawn)
        return {"classes": mean_over_valid(losses, valid)}

    def _losses(self, logits: Tensor, labels: Tensor, drawn: Tensor) -> Tensor:
        """The definition of the losses (R,), by the classes that count (C,)."""
        targets = one_hot(labels, self.num_classes).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, targets, drawn, reduction="none").sum(1)

    def scores(self, logits: Tensor) -> Tensor:
        """Sigmoid of every logit, then zeros for background."""
        return F.pad(logits.float().sigmoid(), (0, 1))
