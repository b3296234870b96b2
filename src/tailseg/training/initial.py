"""Where a run's weights come from: another model of ours (fine-tuning), class by class where the classes differ."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tailseg.data.annotations import Category
from tailseg.data.sources import same_name
from tailseg.errors import UserError
from tailseg.model.detector import Detector
from tailseg.recipe import Recipe
from tailseg.training.checkpoint import load_model

logger = logging.getLogger(__name__)

CLASS_ROWS = {"box_head.classifier": 1, "box_head.regressor": 4, "mask_head.predictor": 1}  # rows of one class
STATISTICS = ".box_head.classification."  # what a loss has counted


def start_from(path: Path, detector: Detector, recipe: Recipe, categories: Sequence[Category]) -> str:
    """Fill a detector with the weights of a model file; returns one sentence that says what was taken.

    With the model's own categories all is taken. With others, rows that belong to a class go to the class of the same
    name, classes that the model does not know keep their random rows, and what its loss had counted is left behind.
    The classifier is taken only if it has the same loss and form.

    Raises:
        UserError: the file is no model, or its architecture is not the recipe's.
    """
    checkpoint = load_model(path)
    theirs, own = checkpoint.state, detector.state_dict()
    labels = {same_name(category.name): label for label, category in enumerate(checkpoint.categories)}
    source = [labels.get(same_name(category.name), -1) for category in categories]
    same = source == list(range(len(checkpoint.categories)))
    ours, other = recipe.classifier, checkpoint.recipe.classifier
    same_classifier = (ours.loss, ours.normalized) == (other.loss, other.normalized)
    keep_classifier = same_classifier and (same or ours.loss != "group-softmax")
    filled: dict[str, Tensor] = {}
    for key, value in own.items():
        if STATISTICS in key:
            filled[key] = theirs[key] if same and same_classifier and key in theirs else value
        elif ".box_head.classifier." in key and not keep_classifier:
            filled[key] = value
        elif key not in theirs:
            raise _other_architecture(path, key, "is missing")
        else:
            filled[key] = _with_rows(path, key, value, theirs[key], source, len(checkpoint.categories))
    left = [key for key in theirs if key not in own and STATISTICS not in key]
    if left:
        raise _other_architecture(path, left[0], "has no place")
    detector.load_state_dict(filled)
    known = len(source) - source.count(-1)
    classifier = "" if keep_classifier else "; the classifier starts anew, for its loss or form is another"
    return f"weights of {path} ({known} of {len(source)} classes known by name{classifier})"


def _with_rows(path: Path, key: str, own: Tensor, theirs: Tensor, source: list[int], their_classes: int) -> Tensor:
    """Our tensor with theirs in it: as it is, or row by row where rows belong to classes."""
    rows = next((count for part, count in CLASS_ROWS.items() if f".{part}." in key), 0)
    classes, extra = len(source), own.shape[0] - len(source) * rows if rows else 0
    of_classes = rows > 0 and extra >= 0 and theirs.shape[0] - their_classes * rows == extra
    if of_classes and own.shape[1:] == theirs.shape[1:]:
        filled = own.clone()
        to = torch.tensor([label for label in range(classes) if source[label] >= 0], dtype=torch.int64)
        of = torch.tensor([label for label in source if label >= 0], dtype=torch.int64)
        by_class, given = (
            t[: n * rows].unflatten(0, (n, rows)) for t, n in ((filled, classes), (theirs, their_classes))
        )
        by_class[to] = given[of].to(own)
        if extra:
            filled[-extra:] = theirs[-extra:]
        return filled
    if own.shape != theirs.shape:
        raise _other_architecture(path, key, f"has shape {tuple(theirs.shape)}, the recipe's {tuple(own.shape)}")
    return theirs


def _other_architecture(path: Path, key: str, what: str) -> UserError:
    return UserError(
        f"--init {path}: '{key}' {what}: the recipe builds another architecture; train with the model's own recipe "
        f"(tailseg train {path} --init {path} ...)"
    )
