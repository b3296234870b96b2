"""What a box head learns its classes with: the number of logits, the loss and the scores live in one object.

So cross-entropy and Seesaw swap without a head knowing which it has. Shape letters: R RoIs, C classes; label C is
background. A loss is divided by the number of valid RoIs, background included (spec, sections 9 and 11).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tailseg.losses.seesaw import SeesawLoss


class Classification(Protocol):
    """A way to learn classes; every implementation is also an `nn.Module` (it may hold counts)."""

    num_classes: int
    num_logits: int

    def loss(self, logits: Tensor, labels: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """Named scalar losses of logits (R, num_logits), labels (R,) in [0, C] and valid (R,) bool."""

    def scores(self, logits: Tensor) -> Tensor:
        """Scores (R, C + 1) in [0, 1] of logits (R, num_logits), background last."""


class CrossEntropyClassification(nn.Module):
    """Softmax cross-entropy over C classes and background (C + 1 logits)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_logits = num_classes + 1

    def loss(self, logits: Tensor, labels: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """Cross-entropy summed over valid RoIs, divided by their number."""
        losses = F.cross_entropy(logits.float(), labels, reduction="none")
        return {"classes": (losses * valid).sum() / valid.sum().clamp(min=1)}

    def scores(self, logits: Tensor) -> Tensor:
        """Softmax over all logits."""
        return logits.float().softmax(dim=1)


class SeesawClassification(nn.Module):
    """Seesaw Loss over the classes and, beside it, an objectness branch (report, section 1.1, Eqs. 1, 2 and 4).

    Logits are C classes, then ``object``, then ``background``. Without the objectness branch background is one more
    class of the Seesaw Loss (C + 1 logits).

    Args:
        num_classes: C.
        p: mitigation exponent of Eq. 2.
        q: compensation exponent of the conference paper; 0 in the report.
        objectness: train the branch of Eq. 4.
    """

    def __init__(self, num_classes: int, *, p: float = 0.8, q: float = 0.0, objectness: bool = True) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.objectness = objectness
        self.num_logits = num_classes + (2 if objectness else 1)
        self.seesaw = SeesawLoss(num_classes if objectness else num_classes + 1, p=p, q=q)

    def loss(self, logits: Tensor, labels: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """``classes`` over the valid foreground (all valid RoIs without objectness), ``objectness`` over all."""
        logits = logits.float()
        total = valid.sum().clamp(min=1)
        counted = valid & (labels < self.seesaw.num_classes)
        own = labels.clamp(max=self.seesaw.num_classes - 1)
        if self.training:
            self.seesaw.count(own, counted)
        losses = self.seesaw.per_sample(logits[:, : self.seesaw.num_classes], own)
        result = {"classes": torch.where(counted, losses, 0.0).sum() / total}
        if self.objectness:
            is_background = (labels == self.num_classes).long()
            losses = F.cross_entropy(logits[:, self.num_classes :], is_background, reduction="none")
            result["objectness"] = (losses * valid).sum() / total
        return result

    def scores(self, logits: Tensor) -> Tensor:
        """Class probability times object probability, and the background's own (Eq. 4); rows sum to 1."""
        logits = logits.float()
        if not self.objectness:
            return logits.softmax(dim=1)
        is_object, background = logits[:, self.num_classes :].softmax(dim=1).split(1, dim=1)
        return torch.cat([logits[:, : self.num_classes].softmax(dim=1) * is_object, background], dim=1)
