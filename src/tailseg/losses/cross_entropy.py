"""Softmax cross-entropy over the classes and background: row 1 of Table 1, what the others are measured against."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from tailseg.losses.classification import Classification, at_least_float32, mean_over_valid


class CrossEntropyClassification(Classification):
    """Softmax cross-entropy over C classes and background (C + 1 logits).

    Args:
        num_classes: C.
    """

    initial_bias = 0.0

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_logits = num_classes + 1

    def loss(self, logits: Tensor, labels: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """Cross-entropy summed over valid RoIs, divided by their number."""
        self.check_inputs(logits, labels, valid)
        return {"classes": mean_over_valid(F.cross_entropy(at_least_float32(logits), labels, reduction="none"), valid)}

    def scores(self, logits: Tensor) -> Tensor:
        """Softmax over all logits."""
        return logits.float().softmax(dim=1)
