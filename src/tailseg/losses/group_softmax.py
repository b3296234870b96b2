"""Balanced group softmax: classes compete only with those about as frequent (arXiv 2006.10408)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tailseg.losses.classification import Classification, ClassStatistics, at_least_float32, one_hot
from tailseg.losses.fused import may_fuse, with_gradient

SMALLEST_SUM = 1e-30  # of e^z in a group: float32 holds what matters of it with all digits


class GroupSoftmaxClassification(Classification):
    """A softmax in each group of classes of similar instance counts, and one of background against foreground (BAGS).

    Every group has one more logit, "others": the answer for RoIs of other groups and, in the background group, for
    foreground. Logits are the C classes, background, the others of the G foreground groups from the rarest on, and the
    others of the background group: C + 1 + (G + 1), for LVIS 1209.

    Of the RoIs of other groups, a foreground group with n own RoIs counts a random others_ratio · n (all, if they are
    fewer; none if n = 0), lest "others" be learnt alone. The background group counts all. The random choice is made
    with torch's own generator of the logits' device, again at every call.

    Args:
        num_classes: C.
        statistics: of the training annotations; a class's group follows from its instances.
        thresholds: rising numbers of instances at which the next group begins; G is one more than their number.
        others_ratio: RoIs of other groups for each of a group's own.

    Raises:
        ValueError: the statistics are of another number of classes, the thresholds do not rise, or the ratio is
            negative.
    """

    needs_statistics = True
    layout_buffers = ("groups",)
    tau_norm_applies = False
    initial_bias = 0.0
    groups: Tensor  # (C, G) float32, 1 at the group of each class; NaN while nothing is known of the data

    def __init__(
        self,
        num_classes: int,
        *,
        statistics: ClassStatistics | None = None,
        thresholds: tuple[int, ...] = (10, 100, 1000),
        others_ratio: float = 8.0,
    ) -> None:
        super().__init__()
        self.statistics_known = statistics is not None
        if sorted(set(thresholds)) != list(thresholds):
            raise ValueError(f"expected rising thresholds, received {thresholds}")
        if others_ratio < 0:
            raise ValueError(f"expected an others_ratio of at least 0, received {others_ratio}")
        self.num_classes = num_classes
        self.num_groups = len(thresholds) + 1
        self.num_logits = num_classes + 1 + self.num_groups + 1
        self.others_ratio = others_ratio
        groups = torch.full((num_classes, self.num_groups), torch.nan)
        if statistics is not None:
            instances = statistics.instances
            if len(instances) != num_classes:
                raise ValueError(f"expected statistics of {num_classes} classes, received {len(instances)}")
            begins = torch.tensor(thresholds, dtype=instances.dtype, device=instances.device)
            groups = one_hot(torch.bucketize(instances, begins, right=True), self.num_groups)
        self.register_buffer("groups", groups)

    def loss(self, logits: Tensor, labels: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """Sum over groups of the mean cross-entropy of the valid RoIs that the group counts."""
        self.check_inputs(logits, labels, valid)
        logits = at_least_float32(logits)
        own = self._members()[labels] > 0  # (R, G + 1)
        counted = self._counted(own, valid)
        shares = counted.to(logits.dtype) / counted.sum(0).clamp(min=1)
        # Multiplied and not selected: a loss that is not a number is to be seen.
        fused = self._fused(logits, labels, own, shares) if may_fuse(logits) else None
        if fused is None:
            losses = self._losses(logits, labels, own, shares)
        else:
            losses = with_gradient(logits, *fused, lambda z: self._losses(z, labels, own, shares))
        return {"classes": losses.sum()}

    def _losses(self, logits: Tensor, labels: Tensor, own: Tensor, shares: Tensor) -> Tensor:
        """The definition of the losses (R,), by a RoI's own group and its shares in the groups' means, (R, G + 1)."""
        return ((self._normalizers(logits) - self._answers(logits, labels, own)) * shares).sum(1)

    def _answers(self, logits: Tensor, labels: Tensor, own: Tensor) -> Tensor:
        """(R, G + 1): the logit that each group should choose."""
        return torch.where(own, logits.gather(1, labels.unsqueeze(1)), logits[:, self.num_classes + 1 :])

    @torch.no_grad()
    def _fused(self, logits: Tensor, labels: Tensor, own: Tensor, shares: Tensor) -> tuple[Tensor, Tensor] | None:
        """Losses (R,) and their gradient (R, num_logits); None where a group lies too far below for one exponential."""
        columns = torch.cat([self._members().t(), torch.eye(self.num_groups + 1)], dim=1).to(logits.dtype)
        exponentials = logits.exp()
        with torch.autocast("cpu", enabled=False):  # it would sum in half precision
            sums = torch.stack([exponentials.mv(group) for group in columns], dim=1)  # (R, G + 1)
            if not float(sums.min()) >= SMALLEST_SUM:
                return None
            gradient = exponentials.mul_((shares / sums).mm(columns))
        losses = ((sums.log() - self._answers(logits, labels, own)) * shares).sum(1)
        gradient.scatter_add_(1, labels.unsqueeze(1), -(shares * own).sum(1, keepdim=True))
        gradient[:, self.num_classes + 1 :].sub_(shares * ~own)
        return losses, gradient

    def scores(self, logits: Tensor) -> Tensor:
        """Softmax of a class in its group times the background group's others, then the latter's background."""
        logits = logits.float()
        normalizers = self._normalizers(logits)
        log_class = logits[:, : self.num_classes] - normalizers[:, self.groups.argmax(1)]
        log_background = logits[:, self.num_classes, None] - normalizers[:, -1:]
        log_foreground = logits[:, -1:] - normalizers[:, -1:]
        return torch.cat([log_class + log_foreground, log_background], dim=1).exp()

    def _members(self) -> Tensor:
        """(C + 1, G + 1) float32: the groups, with background as one more class, alone in one more group."""
        members = F.pad(self.groups, (0, 1, 0, 1))
        members[-1, -1].fill_(1)  # a number assigned would be copied to the device, and waited for
        return members

    def _normalizers(self, logits: Tensor) -> Tensor:
        """(R, G + 1): ln Σ e^z over the classes of each group and its others; NaN if one logit or group is."""
        classes, others = logits.split([self.num_classes + 1, self.num_groups + 1], dim=1)
        # ln 1 = 0 leaves a member's logit, ln 0 = -inf takes all others out of the sum.
        inside = classes.unsqueeze(1) + self._members().t().log()  # (R, G + 1, C + 1)
        return torch.cat([inside, others.unsqueeze(2)], dim=2).logsumexp(dim=2)

    def _counted(self, own: Tensor, valid: Tensor) -> Tensor:
        """(R, G + 1) bool, the RoIs that each group counts, of own (R, G + 1) bool and valid (R,) bool."""
        own, candidates = own & valid.unsqueeze(1), ~own & valid.unsqueeze(1)
        limits = (self.others_ratio * own.sum(0)).floor()
        limits[-1].fill_(torch.inf)
        # Ranks of random keys choose without a number leaving the device; all but candidates rank last.
        keys = torch.rand(own.shape, device=own.device).masked_fill(~candidates, 2.0)
        ranks = keys.argsort(dim=0).argsort(dim=0)
        return own | (candidates & (ranks < limits))
