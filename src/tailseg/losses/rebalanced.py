"""Softmax cross-entropies that know beforehand how many objects each class has: by weight, by margin, by shift.

Class-balanced loss: arXiv 1901.05555. LDAM: arXiv 1906.07413. Logit adjustment: arXiv 2007.07314. They were written for
images of one class each; background, which those do not have and which the annotations do not count, is left as
cross-entropy treats it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tailseg.losses.classification import ClassStatistics, at_least_float32, mean_over_valid
from tailseg.losses.cross_entropy import CrossEntropyClassification


def instances_of(statistics: ClassStatistics | None, num_classes: int) -> Tensor:
    """Objects of each class, (C,) float64, a class without any counted as having one; all NaN without statistics."""
    if statistics is None:
        return torch.full((num_classes,), torch.nan, dtype=torch.float64)
    if len(statistics.instances) != num_classes:
        raise ValueError(f"expected statistics of {num_classes} classes, received {len(statistics.instances)}")
    return statistics.instances.double().clamp(min=1)


class ClassBalancedClassification(CrossEntropyClassification):
    """Cross-entropy whose samples weigh the inverse of their class's effective number (class-balanced loss, section 4).

    Class j with n_j objects weighs (1 - β) / (1 - β^n_j), scaled so that the weights of the classes have mean 1 (the
    paper's sum of C); background weighs 1 (C + 1 logits).

    Args:
        num_classes: C.
        statistics: of the training annotations; its instances are counted.
        beta: β; 0 leaves cross-entropy, and towards 1 weights become the inverse of the number of objects.

    Raises:
        ValueError: the statistics are of another number of classes, or beta is not in [0, 1).
    """

    needs_statistics = True
    weights: Tensor  # (C,) float32, of a sample of each class; NaN while nothing is known of the data

    def __init__(self, num_classes: int, *, statistics: ClassStatistics | None = None, beta: float = 0.999) -> None:
        super().__init__(num_classes)
        self.statistics_known = statistics is not None
        if not 0 <= beta < 1:
            raise ValueError(f"expected beta in [0, 1), received {beta}")
        exponents = instances_of(statistics, num_classes) * torch.tensor(beta, dtype=torch.float64).log()
        weights = 1 / -torch.expm1(exponents)  # 1 / (1 - β^n), also where β^n is all but 1; 1 - β cancels below
        self.register_buffer("weights", (weights / weights.mean()).float())

    def loss(self, logits: Tensor, labels: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """Weighted cross-entropy summed over valid RoIs, divided by their number and not by the sum of their weights.

        Divided by the weights, a step of one class alone would lose what its weight is for.
        """
        self.check_inputs(logits, labels, valid)
        logits = at_least_float32(logits)
        losses = F.cross_entropy(logits, labels, reduction="none") * F.pad(self.weights, (0, 1), value=1.0)[labels]
        return {"classes": mean_over_valid(losses, valid)}


class LDAMClassification(CrossEntropyClassification):
    """Cross-entropy that asks for a margin, the larger the rarer the class (LDAM, section 3.2).

    The logit of the label's class j is lowered by scale · m_j, m_j = max_margin · (n_min / n_j)^(1/4), where n_j is the
    number of objects and n_min the smallest; background has no margin (C + 1 logits). Margins are differences of
    cosines: LDAM is meant for a normalised classifier, and ``scale`` is that one's temperature, by which the logits
    are multiplied already. Scores are of the logits as they are.

    Args:
        num_classes: C.
        statistics: of the training annotations; its instances are counted.
        max_margin: margin of the rarest class; 0 leaves cross-entropy.
        scale: temperature of the classifier.

    Raises:
        ValueError: the statistics are of another number of classes, max_margin is negative or scale not positive.
    """

    needs_statistics = True
    relative_margins: Tensor  # (C,) float32 in (0, 1], m_j / max_margin; NaN while nothing is known of the data

    def __init__(
        self,
        num_classes: int,
        *,
        statistics: ClassStatistics | None = None,
        max_margin: float = 0.5,
        scale: float = 20.0,
    ) -> None:
        super().__init__(num_classes)
        self.statistics_known = statistics is not None
        if not (max_margin >= 0 and scale > 0):
            raise ValueError(f"expected max_margin >= 0 and scale > 0, received {max_margin} and {scale}")
        self.max_margin = max_margin
        self.scale = scale
        instances = instances_of(statistics, num_classes)
        self.register_buffer("relative_margins", (instances.min() / instances).pow(0.25).float())

    def loss(self, logits: Tensor, labels: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """Cross-entropy with the label's logit lowered, summed over valid RoIs, divided by their number."""
        self.check_inputs(logits, labels, valid)
        logits = at_least_float32(logits)
        margins = F.pad(self.relative_margins, (0, 1))[labels] * (self.scale * self.max_margin)  # (R,), in logits
        lowered = logits.scatter_add(1, labels.unsqueeze(1), -margins.to(logits.dtype).unsqueeze(1))
        return {"classes": mean_over_valid(F.cross_entropy(lowered, labels, reduction="none"), valid)}


class LogitAdjustmentClassification(CrossEntropyClassification):
    """Cross-entropy of logits to which the classes' frequencies are added (logit adjustment, Eq. 10).

    L is the cross-entropy of z_j + τ · ln(C · π_j), π_j the class's share of all objects; scores are of the z alone,
    which so have nothing left to learn of the frequencies (C + 1 logits). τ = 1 is balanced softmax (arXiv 2007.10740).

    Among classes the C changes nothing; it is there for background, whose share depends on the sampler and is not
    known beforehand, and which is not shifted. With it a class of average frequency is not shifted either, and with
    τ = 1 the factors C · π_j sum to C, as they do without any shift: so the balance of foreground and background stays
    what it was, where ln π_j alone would lift every class above background by about ln C in the scores.

    Args:
        num_classes: C.
        statistics: of the training annotations; its instances are counted.
        tau: τ; 0 leaves cross-entropy.

    Raises:
        ValueError: the statistics are of another number of classes, or tau is negative.
    """

    needs_statistics = True
    log_ratios: Tensor  # (C,) float32, ln(C · π); NaN while nothing is known of the data

    def __init__(self, num_classes: int, *, statistics: ClassStatistics | None = None, tau: float = 1.0) -> None:
        super().__init__(num_classes)
        self.statistics_known = statistics is not None
        if not tau >= 0:
            raise ValueError(f"expected tau >= 0, received {tau}")
        self.tau = tau
        instances = instances_of(statistics, num_classes)
        self.register_buffer("log_ratios", (instances / instances.mean()).log().float())  # C · π_j is n_j over the mean

    def loss(self, logits: Tensor, labels: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """Cross-entropy of the shifted logits, summed over valid RoIs, divided by their number."""
        self.check_inputs(logits, labels, valid)
        logits = at_least_float32(logits)
        shifted = logits + F.pad(self.tau * self.log_ratios, (0, 1))
        return {"classes": mean_over_valid(F.cross_entropy(shifted, labels, reduction="none"), valid)}
