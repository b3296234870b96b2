"""Seesaw Loss (report, section 1.1, Eqs. 1 and 2; compensation of arXiv 2008.10032, Eq. 5)."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F


def log_seesaw_factors(
    logits: Tensor, labels: Tensor, counts: Tensor, p: float, q: float = 0.0, eps: float = 1e-2
) -> Tensor:
    """Ln S of every sample: what Seesaw adds to the logits of a cross-entropy.

    ln S_ij = p · min(0, ln N_j - ln N_i)  (Eq. 2), with q > 0 plus q · ln max(1, σ_j / max(σ_i, eps)).
    Only the row of each sample's own label is made, never the C x C matrix.

    Args:
        logits: (N, C) float, used for q only.
        labels: (N,) int64 in [0, C).
        counts: (C,) samples seen of each class; less than 1 counts as 1.
        p: mitigation exponent.
        q: compensation exponent.
        eps: floor of σ_i.

    Returns:
        (N, C) in the dtype of the logits, without gradient; 0 at the label.
    """
    with torch.no_grad():
        log_counts = counts.clamp(min=1).to(logits.dtype).log()
        factors = (log_counts - log_counts[labels].unsqueeze(1)).clamp_(max=0).mul_(p)
        if q > 0:
            log_prob = logits.log_softmax(dim=1)
            own = log_prob.gather(1, labels.unsqueeze(1)).clamp(min=math.log(eps))
            factors += (log_prob - own).clamp_(min=0).mul_(q)
        return factors  # the label's own is 0: equal counts, and a ratio of at most 1


class SeesawLoss(nn.Module):
    """Cross-entropy in which samples of frequent classes push rarer classes down less (report, Eqs. 1 and 2).

    L = -z_i + ln(e^{z_i} + Σ_{j≠i} S_ij e^{z_j}), S_ij = min(1, N_j / N_i)^p, where N counts the training samples
    of each class seen so far, those of the present batch included. Counts grow in training mode only, are summed
    over all processes, and are part of the state dict.

    Args:
        num_classes: C.
        p: mitigation exponent; 0 leaves plain cross-entropy.
        q: compensation exponent of the later conference paper; 0 (the report) switches it off.
        eps: floor of the label's own probability in the compensation.
        reduction: ``mean`` over the samples, ``sum`` or ``none``.
        sync_counts: sum the counts over all processes of an initialised `torch.distributed` group.

    Raises:
        ValueError: an argument or a shape is not as described.
    """

    counts: Tensor  # (C,) int64, samples seen of each class

    def __init__(
        self,
        num_classes: int,
        p: float = 0.8,
        q: float = 0.0,
        eps: float = 1e-2,
        reduction: str = "mean",
        sync_counts: bool = True,
    ) -> None:
        super().__init__()
        if num_classes < 1 or p < 0 or q < 0 or not 0 < eps <= 1:
            raise ValueError(
                f"expected num_classes >= 1, p >= 0, q >= 0 and 0 < eps <= 1, received {num_classes}, {p}, {q}, {eps}"
            )
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"expected reduction 'mean', 'sum' or 'none', received {reduction!r}")
        self.num_classes = num_classes
        self.p = p
        self.q = q
        self.eps = eps
        self.reduction = reduction
        self.sync_counts = sync_counts
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.int64))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of a batch; in training mode the batch is counted first.

        Args:
            logits: (N, C) float of any precision; computed in float32 or better.
            labels: (N,) int64 in [0, C).

        Returns:
            Scalar, or (N,) with reduction ``none``; an empty batch gives 0 with a gradient path.
        """
        if logits.dim() != 2 or logits.shape[1] != self.num_classes or labels.shape != logits.shape[:1]:
            raise ValueError(
                f"expected logits (N, {self.num_classes}) and labels (N,), "
                f"received {tuple(logits.shape)} and {tuple(labels.shape)}"
            )
        if self.training:
            self.count(labels)
        losses = self.per_sample(logits, labels)
        if self.reduction == "none":
            return losses
        total = losses.sum()
        return total / max(len(labels), 1) if self.reduction == "mean" else total

    @torch.no_grad()
    def count(self, labels: Tensor, valid: Tensor | None = None) -> None:
        """Add a batch's labels (N,) to the counts; where ``valid`` (N,) is False a sample is not counted."""
        # index_add_ and not bincount: on CUDA the latter waits for the largest label.
        weights = torch.ones_like(labels) if valid is None else valid.to(torch.int64)
        increment = torch.zeros_like(self.counts).index_add_(0, labels, weights)
        if self.sync_counts and dist.is_available() and dist.is_initialized():
            dist.all_reduce(increment)
        self.counts += increment

    def per_sample(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Losses (N,) of logits (N, C) and labels (N,), without counting."""
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits if logits.dtype == torch.float64 else logits.float()
            factors = log_seesaw_factors(logits, labels, self.counts, self.p, self.q, self.eps)
            # The factor of the label itself is 0, so this is Eq. 1, and exact where logits are huge.
            return F.cross_entropy(logits + factors, labels, reduction="none")
