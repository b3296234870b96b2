"""Seesaw Loss (report, section 1.1, Eqs. 1, 2 and 4; compensation of arXiv 2008.10032, Eq. 5)."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from tailseg.losses.classification import Classification, at_least_float32, mean_over_valid, require_labels
from tailseg.losses.seesaw_kernels import seesaw_losses


def log_seesaw_factors(
    logits: Tensor, labels: Tensor, counts: Tensor, p: float, q: float = 0.0, eps: float = 1e-2
) -> Tensor:
    """Ln S of every sample: what Seesaw adds to the logits of a cross-entropy. The loss's definition, step by step.

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
    over all processes, and are part of the state dict. Recomputation by activation checkpointing does not count
    again. Where one batch is scored twice in a step (two branches), call `count` once and `per_sample` for each.

    On CUDA a label outside [0, C) ends in a device-side assertion, since looking at the labels would stall the step.

    Args:
        num_classes: C.
        p: mitigation exponent; 0 leaves plain cross-entropy.
        q: compensation exponent of the later conference paper; 0 (the report) switches it off.
        eps: floor of the label's own probability in the compensation.
        reduction: ``mean`` (over the samples, or over the sum of their weights), ``sum`` or ``none``.
        sync_counts: sum the counts over all processes of an initialised `torch.distributed` group. The sum is
            ordered on the device's stream, so that with NCCL the step does not wait for it. All of them must then
            make the same number of steps in training mode, as with `torch.nn.SyncBatchNorm`.
        count_dtype: of the counts. The public implementation counts in every process for itself, in float32, which
            stands still at 2^24: ``sync_counts=False, count_dtype=torch.float32`` reproduces it.
        process_group: whose processes the counts are summed over; by default all.

    Raises:
        ValueError: an argument is out of its range.
    """

    counts: Tensor  # (C,) samples seen of each class

    def __init__(
        self,
        num_classes: int,
        p: float = 0.8,
        q: float = 0.0,
        eps: float = 1e-2,
        reduction: str = "mean",
        sync_counts: bool = True,
        count_dtype: torch.dtype = torch.int64,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        for name, value, sound in (
            ("num_classes of at least 1", num_classes, num_classes >= 1),
            ("p of at least 0", p, 0 <= p < math.inf),
            ("q of at least 0", q, 0 <= q < math.inf),
            ("eps in (0, 1]", eps, 0 < eps <= 1),
            ("reduction 'mean', 'sum' or 'none'", repr(reduction), reduction in ("mean", "sum", "none")),
        ):
            if not sound:
                raise ValueError(f"SeesawLoss expected {name}, received {value}")
        self.num_classes = num_classes
        self.p = p
        self.q = q
        self.eps = eps
        self.reduction = reduction
        self.sync_counts = sync_counts
        self.process_group = process_group
        self.register_buffer("counts", torch.zeros(num_classes, dtype=count_dtype))

    def __deepcopy__(self, memo: dict[int, Any]) -> SeesawLoss:
        """A copy counts for itself, in the same group of processes, which cannot be copied."""
        twin = self.__class__.__new__(self.__class__)
        memo |= {id(self): twin, id(self.process_group): self.process_group}
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin

    def extra_repr(self) -> str:
        """Settings that `print` shows."""
        return f"{self.num_classes}, p={self.p:g}, q={self.q:g}, reduction={self.reduction!r}"

    def forward(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Loss of a batch; in training mode the batch is counted first.

        Args:
            logits: (N, C) float of any precision; computed in float32 or better.
            labels: (N,) int64 in [0, C).
            weights: (N,) factors of the samples' losses; a sample of weight 0 is not counted.

        Returns:
            Scalar, or (N,) with reduction ``none``; an empty batch gives 0 with a gradient path.

        Raises:
            ValueError: shapes or labels are not as described.
        """
        if weights is not None and weights.shape != labels.shape:
            raise ValueError(f"SeesawLoss expected weights {tuple(labels.shape)}, received {tuple(weights.shape)}")
        self._require_sound(logits, labels)
        if self.training:
            self.count(labels, None if weights is None else weights != 0)
        losses = self._losses(logits, labels)
        if weights is not None:
            losses = losses * weights
        if self.reduction == "none":
            return losses
        if self.reduction == "sum" or len(labels) == 0:  # the mean of nothing would be NaN
            return losses.sum()
        if weights is None:
            return losses.mean()
        divisor = weights.sum()
        return losses.sum() / torch.where(divisor == 0, 1, divisor)

    @torch.no_grad()
    def count(self, labels: Tensor, valid: Tensor | None = None) -> None:
        """Add a batch's labels (N,) to the counts; where ``valid`` (N,) is False a sample is not counted.

        Raises:
            ValueError: a label is outside [0, C) (on CPU).
        """
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() >= 0:
            return  # the backward pass recomputes a checkpointed forward, whose samples were counted then
        require_labels("SeesawLoss", labels, self.num_classes)
        if valid is None and labels.is_cpu and not torch.compiler.is_compiling():
            increment = torch.bincount(labels, minlength=self.num_classes)
        else:  # on CUDA bincount waits for the largest label
            increment = torch.zeros(self.num_classes, dtype=torch.int64, device=labels.device)
            increment.index_add_(0, labels, torch.ones_like(labels) if valid is None else valid.to(torch.int64))
        if self.sync_counts and dist.is_available() and dist.is_initialized():
            dist.all_reduce(increment, group=self.process_group)
        self.counts += increment

    def per_sample(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Losses (N,) of logits (N, C) and labels (N,), without counting.

        Raises:
            ValueError: shapes are not as described, or a label is outside [0, C) (on CPU).
        """
        self._require_sound(logits, labels)
        return self._losses(logits, labels)

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        # Autocast lowers none of the operations that follow, and float32 strengths raise whatever they meet.
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        strengths = self.counts.clamp(min=1).to(dtype).log_().mul_(self.p)
        return seesaw_losses(logits, labels, strengths, self.q, self.eps)

    def _require_sound(self, logits: Tensor, labels: Tensor) -> None:
        if logits.dim() != 2 or logits.shape[1] != self.num_classes or labels.shape != logits.shape[:1]:
            raise ValueError(
                f"SeesawLoss expected logits (N, {self.num_classes}) and labels (N,), "
                f"received {tuple(logits.shape)} and {tuple(labels.shape)}"
            )
        require_labels("SeesawLoss", labels, self.num_classes)


class SeesawClassification(Classification):
    """Seesaw Loss over the classes and, beside it, an objectness branch (report, section 1.1, Eqs. 1, 2 and 4).

    Logits are C classes, then ``object``, then ``background``. Without the objectness branch background is one more
    class of the Seesaw Loss (C + 1 logits).

    Args:
        num_classes: C.
        p: mitigation exponent of Eq. 2.
        q: compensation exponent of the conference paper; 0 in the report.
        objectness: train the branch of Eq. 4.
    """

    learned_buffers = ("seesaw.counts",)
    initial_bias = 0.0

    def __init__(self, num_classes: int, *, p: float = 0.8, q: float = 0.0, objectness: bool = True) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.objectness = objectness
        self.num_logits = num_classes + (2 if objectness else 1)
        self.seesaw = SeesawLoss(num_classes if objectness else num_classes + 1, p=p, q=q)

    def loss(self, logits: Tensor, labels: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """``classes`` over the valid foreground (all valid RoIs without objectness), ``objectness`` over all.

        Both are divided by the number of all valid RoIs (spec, section 11).
        """
        self.check_inputs(logits, labels, valid)
        counted = valid & (labels < self.seesaw.num_classes)
        own = labels.clamp(max=self.seesaw.num_classes - 1)
        if self.training:
            self.seesaw.count(own, counted)
        # Split and not sliced: the gradients of the parts are then put together in one go.
        classes, pair = logits.split([self.seesaw.num_classes, self.num_logits - self.seesaw.num_classes], dim=1)
        losses = self.seesaw.per_sample(classes, own)
        result = {"classes": (losses * counted).sum() / valid.sum().clamp(min=1)}
        if self.objectness:
            is_background = (labels == self.num_classes).long()
            judged = F.cross_entropy(at_least_float32(pair), is_background, reduction="none")
            result["objectness"] = mean_over_valid(judged, valid)
        return result

    def scores(self, logits: Tensor) -> Tensor:
        """Class probability times object probability, and the background's own (Eq. 4); rows sum to 1."""
        logits = logits.float()
        if not self.objectness:
            return logits.softmax(dim=1)
        is_object, background = logits[:, self.num_classes :].softmax(dim=1).split(1, dim=1)
        return torch.cat([logits[:, : self.num_classes].softmax(dim=1) * is_object, background], dim=1)
