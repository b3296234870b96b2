"""Class statistics: what losses want to know of the training set before the first step."""

from __future__ import annotations

import torch

from tailseg.data.annotations.annotations import Annotations
from tailseg.losses import ClassStatistics


def class_statistics(train: Annotations) -> ClassStatistics:
    """Class statistics of the training set; images without objects are not trained on."""
    return ClassStatistics(
        num_images=max(1, len(train) - train.report.empty_images),
        images=torch.tensor([category.image_count for category in train.categories]),
        instances=torch.tensor([category.instance_count for category in train.categories]),
    )
