"""Class statistics: what losses want to know of the training set before the first step."""

from __future__ import annotations

import torch

from tailseg.data.annotations.annotations import Annotations
from tailseg.data.dataset import trained_images
from tailseg.losses import ClassStatistics


def class_statistics(train: Annotations, *, keep_empty: bool = False) -> ClassStatistics:
    """Class statistics of the images that are trained on.

    Args:
        train: the training set.
        keep_empty: those without any annotation are trained on too (see `trained_images`).
    """
    return ClassStatistics(
        num_images=max(1, len(trained_images(train, keep_empty=keep_empty))),
        images=torch.tensor([category.image_count for category in train.categories]),
        instances=torch.tensor([category.instance_count for category in train.categories]),
    )
