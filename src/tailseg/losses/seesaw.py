"""Seesaw Loss (report, section 1.1, Eqs. 1, 2 and 4; compensation of arXiv 2008.10032, Eq. 5)."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tailseg.layers.watched import is_watched
from tailseg.losses.classification import Classification, one_hot
from tailseg.losses.inputs import FlatTargets, flat_targets, require_labels, whole_labels
from tailseg.losses.seesaw_kernels import (
    count_labels,
    fused_parts,
    plain_parts,
    seesaw_losses,
    soft_seesaw,
    takes_triton,
    triton_means,
)

LARGEST_P = 2.0  # at which N^p of any count fits float32


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

    L_i = -z_i + ln(e^{z_i} + Σ_{j≠i} S_ij e^{z_j}), S_ij = min(1, N_j / N_i)^p, where i is the label and N counts the
    training samples of each class seen so far, those of the present batch included. Counts grow in training mode only,
    are summed over all processes, and are part of the state dict. Recomputation by activation checkpointing does not
    count again. Where one batch is scored twice in a step (two branches), call `count` once and `per_sample` for each.

    Shapes and options are those of `torch.nn.CrossEntropyLoss`, which p = q = 0 gives exactly; only a mean over no
    samples is 0 here, not NaN. Soft labels t, label smoothing ε and class weights w make the loss the mean over labels

        L = Σ_c w_c · t'_c · L_c,  t'_c = (1 - ε) · t_c + ε / C.

    A hard label is t_c = 1. A sample with a soft label counts once, for the class of its largest share; smoothing and
    class weights do not change the counts.

    On CUDA a label out of range ends in a device-side assertion, since looking at the labels would stall the step.

    Args:
        num_classes: C.
        p: mitigation exponent; 0 leaves plain cross-entropy.
        q: compensation exponent of the later conference paper; 0 (the report) switches it off. With soft labels or
            smoothing it needs memory for C times the logits.
        eps: floor of the label's own probability in the compensation.
        reduction: ``mean``, ``sum`` or ``none``. The mean is over the samples that are not ignored; with hard labels
            each weighs its class weight times its sample weight, with soft labels its sample weight.
        sync_counts: sum the counts over all processes of an initialised `torch.distributed` group. The sum is
            ordered on the device's stream, so that with NCCL the step does not wait for it. All of them must then
            make the same number of steps in training mode, as with `torch.nn.SyncBatchNorm`.
        count_dtype: of the counts. The public implementation counts in every process for itself, in float32, which
            stands still at 2^24: ``sync_counts=False, count_dtype=torch.float32`` reproduces it.
        process_group: whose processes the counts are summed over; by default all.
        ignore_index: hard label of samples that have no loss and are not counted.
        label_smoothing: ε in [0, 1].
        weight: (C,) float, weights w of the classes; not part of the state dict.

    Raises:
        ValueError: an argument is out of its range.
    """

    counts: Tensor  # (C,) samples seen of each class
    weight: Tensor | None  # (C,)

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
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        weight: Tensor | None = None,
    ) -> None:
        super().__init__()
        for name, value, sound in (
            ("num_classes of at least 1", num_classes, num_classes >= 1),
            ("p of at least 0", p, 0 <= p < math.inf),
            ("q of at least 0", q, 0 <= q < math.inf),
            ("eps in (0, 1]", eps, 0 < eps <= 1),
            ("reduction 'mean', 'sum' or 'none'", repr(reduction), reduction in ("mean", "sum", "none")),
            ("label_smoothing in [0, 1]", label_smoothing, 0 <= label_smoothing <= 1),
        ):
            if not sound:
                raise ValueError(f"SeesawLoss expected {name}, received {value}")
        if weight is not None:
            if weight.shape != (num_classes,) or not weight.is_floating_point():
                received = f"{tuple(weight.shape)} {weight.dtype}"
                raise ValueError(f"SeesawLoss expected weight ({num_classes},) of floats, received {received}")
            if not (weight.isfinite() & (weight >= 0)).all():
                raise ValueError(f"SeesawLoss expected finite class weights of at least 0, received {weight.tolist()}")
        self.num_classes = num_classes
        self.p = p
        self.q = q
        self.eps = eps
        self.reduction = reduction
        self.sync_counts = sync_counts
        self.process_group = process_group
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.register_buffer("counts", torch.zeros(num_classes, dtype=count_dtype))
        self.register_buffer("weight", weight, persistent=False)

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
            logits: (N, C), (N, C, d1, ...) or (C,) float of any precision; computed in float32 or better.
            labels: (N,), (N, d1, ...) or () int64 or uint8 in [0, C) or `ignore_index`; or soft labels, float in
                [0, 1] in the shape of the logits.
            weights: factors of the samples' losses, in the shape of hard labels; a sample of weight 0 is not counted.

        Returns:
            Scalar, or with reduction ``none`` a loss a sample, in the shape of hard labels; a batch without samples,
            or with nothing but ignored ones, gives 0 with a gradient path.

        Raises:
            ValueError: a shape, a type or (on CPU) a label is not as described.
        """
        flat = flat_targets("SeesawLoss", logits, labels, self.num_classes, self.ignore_index)
        counted = flat.counted
        if weights is not None:
            if weights.shape != flat.shape:
                expected, received = tuple(flat.shape), tuple(weights.shape)
                raise ValueError(f"SeesawLoss expected weights {expected}, received {received}")
            weights = weights.flatten()
            counted = weights != 0 if counted is None else (weights != 0) & counted
        if self.training:
            self._add(flat.labels, counted)
        plain = flat.soft is None and not self.label_smoothing and self.weight is None and weights is None
        if self.reduction == "mean" and plain and len(flat.logits) and takes_triton(flat.logits):
            about = self.counts, self.p, self.q, self.eps
            return triton_means(flat.logits, flat.labels, counted, *about, select=True)[0]
        losses = self._losses(flat)
        if weights is not None:
            losses = losses * weights
        if self.reduction == "none":
            return losses.reshape(flat.shape)
        if self.reduction == "sum" or len(losses) == 0:  # the mean of nothing would be NaN
            return losses.sum()
        divisor = self._divisor(flat, weights)
        return losses.mean() if divisor is None else losses.sum() / divisor

    @torch.no_grad()
    def count(self, labels: Tensor, valid: Tensor | None = None) -> None:
        """Add a batch's hard labels, of any shape, to the counts.

        Ignored samples are not counted, nor are those where ``valid`` (bool, of the same shape) is False.

        Raises:
            ValueError: labels are neither int64 nor uint8, or (on CPU) one is out of range.
        """
        labels = whole_labels(labels)
        none_ignored = require_labels("SeesawLoss", labels, self.num_classes, ignore_index=self.ignore_index)
        labels, valid = labels.flatten(), None if valid is None else valid.flatten()
        if not none_ignored:
            known = labels != self.ignore_index
            labels, valid = labels * known, known if valid is None else known & valid
        self._add(labels, valid)

    def per_sample(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Losses in the shape of hard labels, arguments of `forward`, without counting.

        Raises:
            ValueError: a shape, a type or (on CPU) a label is not as described.
        """
        flat = flat_targets("SeesawLoss", logits, labels, self.num_classes, self.ignore_index)
        return self._losses(flat).reshape(flat.shape)

    @torch.no_grad()
    def _add(self, labels: Tensor, counted: Tensor | None, *, background: bool = False) -> None:
        """Add labels (M,) in [0, C) to the counts, where ``counted`` (M,) is True; with ``background`` C is none."""
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() >= 0:
            return  # the backward pass recomputes a checkpointed forward, whose samples were counted then
        synced = self.sync_counts and dist.is_available() and dist.is_initialized()
        at_once = not synced and self.counts.dtype == torch.int64  # floats would round one by one
        if takes_triton(labels):
            increment = self.counts if at_once else torch.zeros_like(self.counts, dtype=torch.int64)
            count_labels(labels, counted, increment, background=background)
            if at_once:
                return
        else:
            if background:
                known = labels < self.num_classes
                labels, counted = labels.clamp(max=self.num_classes - 1), known if counted is None else known & counted
            if counted is None and labels.is_cpu and not torch.compiler.is_compiling():
                increment = torch.bincount(labels, minlength=self.num_classes)
            else:  # on other devices bincount waits for the largest label
                ones = torch.ones_like(labels) if counted is None else counted.to(torch.int64)
                if at_once:
                    self.counts.index_add_(0, labels, ones)
                    return
                increment = torch.zeros(self.num_classes, dtype=torch.int64, device=labels.device)
                increment.index_add_(0, labels, ones)
        if synced:
            dist.all_reduce(increment, group=self.process_group)
        self.counts += increment

    def _losses(self, flat: FlatTargets) -> Tensor:
        """Losses (M,), class weights included; 0 where a label is ignored."""
        if flat.soft is None and not self.label_smoothing:
            losses = self._hard_losses(flat.logits, flat.labels)
            if self.weight is not None:
                losses = losses * self.weight[flat.labels]
        else:
            strengths = self._strengths(flat.logits)
            soft = one_hot(flat.labels, self.num_classes) if flat.soft is None else flat.soft
            soft = soft.to(strengths.dtype) * (1 - self.label_smoothing) + self.label_smoothing / self.num_classes
            soft = soft if self.weight is None else soft * self.weight
            losses = soft_seesaw(flat.logits, soft, strengths, self.q, self.eps, steep=self.p > LARGEST_P)
        return losses if flat.counted is None or flat.soft is not None else losses.where(flat.counted, 0)

    def _hard_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        return seesaw_losses(logits, labels, self._strengths(logits), self.q, self.eps)

    def _strengths(self, logits: Tensor) -> Tensor:
        """(C,) p · ln N in the dtype that the losses are computed in."""
        # Autocast lowers none of the operations that follow, and float32 strengths raise whatever they meet.
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        return self.counts.clamp(min=1).to(dtype).log_().mul_(self.p)

    def _divisor(self, flat: FlatTargets, weights: Tensor | None) -> Tensor | None:
        """What the mean divides the sum of losses by; None: the number of samples."""
        counted = flat.counted if flat.soft is None else None
        if flat.soft is None and self.weight is not None:
            own = self.weight[flat.labels]
            weights = own if weights is None else weights * own
        if weights is None:
            return None if counted is None else counted.sum().clamp(min=1)
        divisor = (weights if counted is None else weights * counted).sum()
        return torch.where(divisor == 0, 1, divisor)


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

        Both are divided by the number of all valid RoIs.
        """
        self.check_inputs(logits, labels, valid)
        if self.training:
            self.seesaw._add(labels, valid, background=self.objectness)
        return {name: mean for name, mean in self._means(logits, labels, valid).items() if mean is not None}

    def _means(self, logits: Tensor, labels: Tensor, valid: Tensor) -> dict[str, Tensor | None]:
        about = self.seesaw
        if len(logits) and takes_triton(logits):
            classes, objectness = triton_means(logits, labels, valid, about.counts, about.p, about.q, about.eps)
            return {"classes": classes, "objectness": objectness}
        parts = plain_parts if is_watched() else fused_parts
        losses, judged = parts(logits, labels, about._strengths(logits), about.q, about.eps)
        counted, number = valid & (labels < about.num_classes), valid.sum().clamp(min=1)
        # Weighed and not selected: a loss that is not a number is to be seen, not dropped.
        return {
            "classes": losses.dot(counted.to(losses.dtype) / number),
            "objectness": None if judged is None else judged.dot(valid.to(judged.dtype) / number),
        }

    def scores(self, logits: Tensor) -> Tensor:
        """Class probability times object probability, and the background's own (Eq. 4); rows sum to 1."""
        logits = logits.float()
        if not self.objectness:
            return logits.softmax(dim=1)
        is_object, background = logits[:, self.num_classes :].softmax(dim=1).split(1, dim=1)
        return torch.cat([logits[:, : self.num_classes].softmax(dim=1) * is_object, background], dim=1)
