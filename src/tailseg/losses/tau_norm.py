"""Tau-normalisation: a trained linear classifier, rebalanced without training (arXiv 1910.09217, section 4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


@torch.no_grad()
def tau_normalize(weight: Tensor, bias: Tensor, num_classes: int, tau: float) -> tuple[Tensor, Tensor]:
    """Divide the weight row of each class by its norm to the power of tau, since frequent classes grow long rows.

    The first C rows are those of the classes. What lies behind them (background, objectness) stays as it is, so the
    classes as a whole must keep their place beside it, which the paper, having classes only, need not care for:

    - Rows are multiplied by the mean over classes of ‖w‖^τ. A common factor does not change the order of the classes,
      but without it long rows would fade against background, and short ones would outgrow it.
    - The paper drops the bias. Here each class gets the mean bias of the classes: what a bias says of the class's
      frequency goes, what all together say against background stays. With 0 the result would hang on chance, since a
      constant added to all biases, background's included, does not change a softmax; and sigmoids would lose the
      prior that they start from.

    It makes no sense for a `NormalizedLinear`, whose logits do not depend on norms.

    Args:
        weight: (K, F) float, K >= C.
        bias: (K,) float.
        num_classes: C.
        tau: 0 returns the very inputs, bias included (any other value, however small, evens out the biases);
            1 gives all classes the same norm.

    Returns:
        Weight (K, F) and bias (K,), without gradient where tau > 0, in their own dtypes. A row of norm 0 stays, and
        is left out of the mean.

    Raises:
        ValueError: the shapes are not as described, or tau is negative or not finite.
    """
    if weight.dim() != 2 or bias.shape != weight.shape[:1] or not 1 <= num_classes <= len(weight):
        raise ValueError(
            f"expected weight (K, F) and bias (K,) with K >= num_classes = {num_classes} >= 1, "
            f"received {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if not (math.isfinite(tau) and tau >= 0):
        raise ValueError(f"expected a finite tau >= 0, received {tau}")
    if tau == 0:
        return weight, bias
    classes = weight[:num_classes].double()
    norms = torch.linalg.vector_norm(classes, dim=1, keepdim=True)
    has_length = norms != 0
    powers = torch.where(has_length, norms, 1.0).pow(tau)
    mean_power = (powers * has_length).sum() / has_length.sum().clamp(min=1)
    rebalanced = torch.cat([(classes / powers * mean_power).to(weight.dtype), weight[num_classes:]])
    evened = torch.cat([bias[:num_classes].double().mean().to(bias.dtype).expand(num_classes), bias[num_classes:]])
    return rebalanced, evened
