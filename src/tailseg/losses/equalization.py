"""Equalization Loss and Equalization Loss v2: sigmoid losses that spare rare classes the push of other classes' RoIs.

EQL is of arXiv 2003.05176, EQL v2 of arXiv 2012.08548.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from tailseg.losses.classification import (
    PRIOR_001,
    Classification,
    ClassStatistics,
    at_least_float32,
    mean_over_valid,
    one_hot,
)
from tailseg.losses.fused import Entropies, binary_entropies, may_fuse, with_gradient

UNSEEN_RATIO = 100.0  # of a class that has had no gradient yet: it is weighted as one in balance


class EqualizationClassification(Classification):
    """EQL: one sigmoid a class, in which foreground of other classes does not push rare classes down (C logits).

    L = Σ_r Σ_j w_rj · BCE(z_rj, t_rj) / R, with w_rj = 0 where RoI r is foreground of another class than j and j is
    rare, else 1. Background is the absence of every class: it has no logit, and pushes rare classes down too.

    Args:
        num_classes: C.
        statistics: of the training annotations; a class is rare by its share of images.
        threshold: λ, the share of images below which a class is rare.

    Raises:
        ValueError: the statistics are of another number of classes, or the threshold is not in [0, 1].
    """

    needs_statistics = True
    initial_bias = PRIOR_001
    spared: Tensor  # (C,) float32, 1 for rare classes; NaN while nothing is known of the data

    def __init__(
        self, num_classes: int, *, statistics: ClassStatistics | None = None, threshold: float = 1.1e-3
    ) -> None:
        super().__init__()
        self.statistics_known = statistics is not None
        if not 0 <= threshold <= 1:
            raise ValueError(f"expected a threshold in [0, 1], received {threshold}")
        self.num_classes = num_classes
        self.num_logits = num_classes
        spared = torch.full((num_classes,), torch.nan)
        if statistics is not None:
            if len(statistics.images) != num_classes:
                raise ValueError(f"expected statistics of {num_classes} classes, received {len(statistics.images)}")
            spared = (statistics.images.double() / statistics.num_images < threshold).float()
        self.register_buffer("spared", spared)

    def loss(self, logits: Tensor, labels: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """Weighted binary cross-entropies of a RoI, summed over classes; their mean over valid RoIs."""
        self.check_inputs(logits, labels, valid)
        logits = at_least_float32(logits)
        if may_fuse(logits):
            ones = torch.ones_like(self.spared)
            negative, is_foreground = torch.stack([ones, 1 - self.spared]), (labels < self.num_classes).long()
            found = binary_entropies(logits, labels, negative, ones, valid, is_foreground)
            losses = with_gradient(logits, found.losses, found.gradient, lambda z: self._losses(z, labels))
        else:
            losses = self._losses(logits, labels)
        return {"classes": mean_over_valid(losses, valid)}

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The definition of the losses (R,)."""
        targets = one_hot(labels, self.num_classes).to(logits.dtype)
        is_foreground = (labels < self.num_classes).unsqueeze(1)
        weights = 1 - is_foreground * self.spared * (1 - targets)
        return F.binary_cross_entropy_with_logits(logits, targets, weights, reduction="none").sum(1)

    def scores(self, logits: Tensor) -> Tensor:
        """Sigmoid of every logit, then zeros for background."""
        return F.pad(logits.float().sigmoid(), (0, 1))


class EqualizationV2Classification(Classification):
    """EQL v2: sigmoids whose weights balance the gradients that a class has had as positive and as negative.

    Of each class j the ratio g_j = P_j / Q_j of the gradients so far gives f_j = 1 / (1 + e^{-γ (g_j - μ)}), the weight
    of its negatives is f_j and that of its positives 1 + α · (1 - f_j). Logits are C classes, then background (C + 1),
    whose weights are 1. The gradients |σ - t| times their weight grow by a batch's own after its loss, in training mode
    only, are summed over all processes, and are part of the state dict.

    Args:
        num_classes: C.
        gamma: γ, how sharply the weights change where g_j passes μ.
        mu: μ, the ratio at which a negative weighs 1/2.
        alpha: α, at most how much more a positive weighs.

    Raises:
        ValueError: an argument is negative.
    """

    learned_buffers = ("positive_gradients", "negative_gradients")
    initial_bias = PRIOR_001
    positive_gradients: Tensor  # (C,) float32, P: of RoIs of the class
    negative_gradients: Tensor  # (C,) float32, Q: of all other RoIs

    def __init__(self, num_classes: int, *, gamma: float = 12.0, mu: float = 0.8, alpha: float = 4.0) -> None:
        super().__init__()
        if gamma < 0 or mu < 0 or alpha < 0:
            raise ValueError(f"expected gamma, mu and alpha of at least 0, received {gamma}, {mu}, {alpha}")
        self.num_classes = num_classes
        self.num_logits = num_classes + 1
        self.gamma = gamma
        self.mu = mu
        self.alpha = alpha
        self.sync_counts = True  # sum the gradients over all processes
        self.register_buffer("positive_gradients", torch.zeros(num_classes))
        self.register_buffer("negative_gradients", torch.zeros(num_classes))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EqualizationV2Classification:
        """Move and cast as modules are, but keep the sums in float32 at least: in less they would soon stand still."""
        before = {name: getattr(self, name) for name in self.learned_buffers}
        super()._apply(fn, recurse)
        for name, sums in before.items():
            after = getattr(self, name)
            if torch.promote_types(after.dtype, torch.float32) != after.dtype:
                setattr(self, name, sums.to(after.device))
        return self

    def ratios(self) -> Tensor:
        """Ratios g (C,): gradients so far as positive over those as negative; 100 for a class that has had none."""
        ratio = self.positive_gradients / (self.negative_gradients + 1e-10)
        # Compared with 0 and not summed: a class whose gradients are not a number must stay so.
        untouched = (self.positive_gradients == 0) & (self.negative_gradients == 0)
        return torch.where(untouched, UNSEEN_RATIO, ratio)

    def loss(self, logits: Tensor, labels: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """Weighted binary cross-entropies of a RoI, summed over outputs; their mean over valid RoIs."""
        self.check_inputs(logits, labels, valid)
        logits = at_least_float32(logits)
        share = torch.sigmoid(self.gamma * (self.ratios() - self.mu))
        negative = F.pad(share, (0, 1), value=1.0)  # background: 1, and so 1 as positive too
        positive = 1 + self.alpha * (1 - negative)
        if may_fuse(logits):
            found = binary_entropies(logits, labels, negative, positive, valid)
            losses = with_gradient(
                logits, found.losses, found.gradient, lambda z: self._losses(z, labels, negative, positive)
            )
            if self.training:
                self._collect(self._gained(found, labels, valid))
        else:
            losses = self._losses(logits, labels, negative, positive)
            if self.training:
                self._collect(self._gradients(logits.detach(), labels, negative, positive, valid))
        return {"classes": mean_over_valid(losses, valid)}

    def _losses(self, logits: Tensor, labels: Tensor, negative: Tensor, positive: Tensor) -> Tensor:
        """The definition of the losses (R,), by the weights (C + 1,) of negatives and positives."""
        targets = one_hot(labels, self.num_logits).to(logits.dtype)
        weights = targets * positive + (1 - targets) * negative
        return F.binary_cross_entropy_with_logits(logits, targets, weights, reduction="none").sum(1)

    @torch.no_grad()
    def _gradients(self, logits: Tensor, labels: Tensor, negative: Tensor, positive: Tensor, valid: Tensor) -> Tensor:
        """Weighted |σ - t| of a batch, (2, C + 1): those of the classes as positives, and as negatives."""
        targets = one_hot(labels, self.num_logits).to(logits.dtype)
        weights = (targets * positive + (1 - targets) * negative) * valid.unsqueeze(1)
        gradients = (logits.sigmoid() - targets).abs() * weights
        return torch.stack([(gradients * targets).sum(0), (gradients * (1 - targets)).sum(0)])

    @torch.no_grad()
    def _gained(self, found: Entropies, labels: Tensor, valid: Tensor) -> Tensor:
        """The same of entropies that have it."""
        own = torch.zeros_like(found.others).index_add_(0, labels, found.own * valid)
        return torch.stack([own, found.others])

    @torch.no_grad()
    def _collect(self, increment: Tensor) -> None:
        """Add a batch's gradients (2, C + 1), of all processes, to what each class has had."""
        if self.sync_counts and dist.is_available() and dist.is_initialized():
            dist.all_reduce(increment)
        self.positive_gradients += increment[0, : self.num_classes]
        self.negative_gradients += increment[1, : self.num_classes]

    def scores(self, logits: Tensor) -> Tensor:
        """σ(z_j) · (1 - σ(z_background)) of the classes, then σ(z_background)."""
        classes, background = logits.float().split([self.num_classes, 1], dim=1)
        # 1 - σ(z) is σ(-z), which keeps its digits where background is all but certain.
        return torch.cat([classes.sigmoid() * (-background).sigmoid(), background.sigmoid()], dim=1)
