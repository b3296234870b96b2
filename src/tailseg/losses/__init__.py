"""The losses: one file each; usable with any model."""

from typing import Any

from tailseg.losses.classification import Classification, ClassStatistics
from tailseg.losses.cross_entropy import CrossEntropyClassification
from tailseg.losses.equalization import EqualizationClassification, EqualizationV2Classification
from tailseg.losses.federated import FederatedClassification
from tailseg.losses.focal import FocalClassification
from tailseg.losses.group_softmax import GroupSoftmaxClassification
from tailseg.losses.rebalanced import (
    ClassBalancedClassification,
    LDAMClassification,
    LogitAdjustmentClassification,
)
from tailseg.losses.seesaw import SeesawClassification, SeesawLoss
from tailseg.losses.tau_norm import tau_normalize

# By the name in a recipe's `classifier.loss`. Values of one call signature would need a protocol of constructors.
CLASSIFICATIONS: dict[str, Any] = {
    "cross-entropy": CrossEntropyClassification,
    "seesaw": SeesawClassification,
    "eql": EqualizationClassification,
    "eql-v2": EqualizationV2Classification,
    "group-softmax": GroupSoftmaxClassification,
    "federated": FederatedClassification,
    "class-balanced": ClassBalancedClassification,
    "ldam": LDAMClassification,
    "logit-adjustment": LogitAdjustmentClassification,
    "focal": FocalClassification,
}
NEED_STATISTICS = frozenset(
    {
        EqualizationClassification,
        GroupSoftmaxClassification,
        FederatedClassification,
        ClassBalancedClassification,
        LDAMClassification,
        LogitAdjustmentClassification,
    }
)

__all__ = [
    "CLASSIFICATIONS",
    "NEED_STATISTICS",
    "ClassBalancedClassification",
    "ClassStatistics",
    "Classification",
    "CrossEntropyClassification",
    "EqualizationClassification",
    "EqualizationV2Classification",
    "FederatedClassification",
    "FocalClassification",
    "GroupSoftmaxClassification",
    "LDAMClassification",
    "LogitAdjustmentClassification",
    "SeesawClassification",
    "SeesawLoss",
    "tau_normalize",
]
