"""Focal loss: sigmoids in which an easy example counts for little (arXiv 1708.02002, Eq. 5)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tailseg.losses.classification import PRIOR_01, Classification, at_least_float32, one_hot
from tailseg.losses.fused import may_fuse, with_gradient


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

    initial_bias = PRIOR_01  # the paper's (section 4.1)

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
        if may_fuse(logits):
            losses = with_gradient(logits, *self._fused(logits, labels), lambda z: self._losses(z, labels))
        else:
            losses = self._losses(logits, labels)
        foreground = (valid & (labels < self.num_classes)).sum()
        return {"classes": (losses * valid).sum() / foreground.clamp(min=1)}

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The definition of the losses (R,)."""
        own = one_hot(labels, self.num_classes).bool()
        towards_truth = torch.where(own, logits, -logits)  # its sigmoid is p_t
        # The power is taken of the logarithm: 1 - p_t rounds to 0 for large logits, where a root has no gradient.
        modulation = torch.exp(self.gamma * F.logsigmoid(-towards_truth))
        losses = -modulation * F.logsigmoid(towards_truth)
        return torch.where(own, self.alpha * losses, (1 - self.alpha) * losses).sum(1)

    @torch.no_grad()
    def _fused(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (R,) and their gradient (R, C): of all as negatives first, then of the label's own."""
        place = labels.clamp(max=self.num_classes - 1).unsqueeze(1)
        is_own = (labels < self.num_classes).unsqueeze(1)
        exponentials = logits.exp()
        softplus = exponentials.log1p()  # -ln p_t
        modulation = (logits - softplus).mul_(self.gamma).exp_()  # σ(z)^γ
        losses = softplus.mul_(modulation)
        total = exponentials + 1
        gradient = exponentials.div_(total).mul_(modulation)
        gradient.add_(total.reciprocal_().mul_(losses), alpha=self.gamma).mul_(1 - self.alpha)
        for each in (losses, gradient):
            each.scatter_(1, place, each.gather(1, place).masked_fill_(is_own, 0))
        own = logits.gather(1, place)
        log_own, log_other = F.logsigmoid(own), F.logsigmoid(-own)
        weight = self.alpha * torch.exp(self.gamma * log_other) * is_own
        gradient.scatter_add_(1, place, weight * (self.gamma * own.sigmoid() * log_own - log_other.exp()))
        return losses.sum(1) * (1 - self.alpha) - (weight * log_own).squeeze(1), gradient

    def scores(self, logits: Tensor) -> Tensor:
        """Sigmoid of every logit, then zeros for background."""
        return F.pad(logits.float().sigmoid(), (0, 1))
