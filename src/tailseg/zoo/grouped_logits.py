"""The logits of a balanced group softmax, sorted from mmdetection's order (tztztztztz/eqlv2) into ours."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from tailseg.errors import UserError

BEGINNING = "box_head.classification.groups"


def sort_logits(
    state: dict[str, Tensor], instances: Sequence[int], thresholds: Sequence[int], path: Path, source: str
) -> None:
    """Sort the rows of every classifier, and add which class is in which group.

    Theirs are, group by group from the rarest classes on: others, the group's classes; at last others, background. Ours
    are in the order of `tailseg.losses.GroupSoftmaxClassification`.

    Args:
        state: tensors under our names, changed in place.
        instances: of each class in the training annotations.
        thresholds: numbers of instances at which the next group begins.
        path: of the checkpoint, for errors.
        source: where the numbers of instances come from, for errors.

    Raises:
        UserError: nothing is known of the numbers of instances, or the classifier has another number of rows.
    """
    if not any(instances):
        raise UserError(
            f"{path}: has a balanced group softmax, whose groups follow from the training instances of each class, and "
            f"{source} has no instance_count; give the annotations that it was trained on with --categories"
        )
    groups = [bisect_right(thresholds, count) for count in instances]
    count = len(thresholds) + 1
    sizes = [groups.count(group) for group in range(count)]
    starts = [sum(sizes[:group]) + group for group in range(count + 1)]  # where a group's others stand
    places, before = [], [0] * count
    for group in groups:
        before[group] += 1
        places.append(starts[group] + before[group])
    order = torch.tensor([*places, starts[-1] + 1, *starts])
    for key in [key for key in state if key.endswith((".box_head.classifier.weight", ".box_head.classifier.bias"))]:
        if len(state[key]) != len(order):
            raise UserError(
                f"{path}: '{key}' has {len(state[key])} rows, but a group softmax of {len(groups)} classes in {count} "
                f"groups has {len(order)}"
            )
        state[key] = state[key][order]
        stage = key.partition(".box_head.")[0]
        state[f"{stage}.{BEGINNING}"] = F.one_hot(torch.tensor(groups), count).float()
