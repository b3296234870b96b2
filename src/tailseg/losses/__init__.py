"""The losses: one file each; usable with any model."""

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

CLASSIFICATIONS: dict[str, type[Classification]] = {  # by the name in a recipe's `classifier.loss`
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

__all__ = [
    "CLASSIFICATIONS",
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
