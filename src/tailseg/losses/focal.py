"""Focal loss: sigmoids in which an easy example counts for little (arXiv 1708.02002, Eq. 5)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tailseg.losses.classification import Classification, at_least_float32, one_hot


class FocalClassification(Classification):
    """One sigmoid a class, FL = -α_t · (1 - p_t)^γ · ln p_t (C logits, no logit of background).

    p_t is the probability given to what is true of RoI and class: σ(z) for the label's class, 1 - σ(z) for every other
    one, and for all of them where the RoI is background; α_t is α and 1 - α.

    Args:
        num_classes: C.
        gamma: γ, focusing exponent; 0 leaves binary cross-entropy weighted by α.
        alpha: α, weight of positives.

    Raises:
        ValueError: gamma is negative, or alpha not in [0, 1].
    """

    initial_bias = -4.595120  # ln(0.01 / 0.99): a sigmoid starts at the paper's prior of 0.01 (section 4.1)

    def __init__(self, num_classes: int, *, gamma: float = 2.0, alpha: float = 0.25) -> None:
        super().__init__()
        if not (gamma >= 0 and 0 <= alpha <= 1):
            raise ValueError(f"expected gamma >= 0 and alpha in [0, 1], received {gamma} and {alpha}")
        self.num_classes = num_classes
        self.num_logits = num_classes
        self.gamma = gamma
        self.alpha = alpha

    def loss(self, logits: Tensor, labels: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """Focal losses summed over classes and valid RoIs, divided by the number of valid foreground RoIs (at least 1).

        So the paper normalises (section 4.1): easy background adds next to nothing, and is not to dilute the rest.
        """
        self.check_inputs(logits, labels, valid)
        logits = at_least_float32(logits)
        own = one_hot(labels, self.num_classes).bool()
        towards_truth = torch.where(own, logits, -logits)  # its sigmoid is p_t
        # The power is taken of the logarithm: 1 - p_t rounds to 0 for large logits, where a root has no gradient.
        modulation = torch.exp(self.gamma * F.logsigmoid(-towards_truth))
        losses = -modulation * F.logsigmoid(towards_truth)
        losses = torch.where(own, self.alpha * losses, (1 - self.alpha) * losses).sum(1)
        foreground = (valid & (labels < self.num_classes)).sum()
        return {"classes": (losses * valid).sum() / foreground.clamp(min=1)}

    def scores(self, logits: Tensor) -> Tensor:
        """Sigmoid of every logit, then zeros for background."""
        return F.pad(logits.float().sigmoid(), (0, 1))
