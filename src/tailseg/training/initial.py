"""Where a run's weights come from: another model of ours (fine-tuning), class by class where the classes differ."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tailseg.data.annotations import Category
from tailseg.data.sources import same_name
from tailseg.errors import UserError
from tailseg.model.detector import Detector
from tailseg.recipe import Recipe
from tailseg.training.checkpoint import Checkpoint, load_model

logger = logging.getLogger(__name__)

CLASS_ROWS = {  # rows of one class
    "box_head.classifier": 1,
    "box_head.regressor": 4,
    "box_head.sibling_classifier": 1,
    "box_head.sibling_regressor": 4,
    "context.classifier": 1,
    "mask_head.predictor": 1,
    "mask_iou.predictor": 1,
}
CLASSIFIERS = ("box_head.classifier", "box_head.sibling_classifier")  # whose logits are the loss's own
STATISTICS = ".box_head.classification."  # what a loss knows of the classes
RUNNING = ("seesaw.counts", "positive_gradients", "negative_gradients")  # of it, what it learnt in training


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
    source = _their_labels(categories, checkpoint.categories)
    same = source == list(range(len(checkpoint.categories)))
    keep_classifier = _same_classifier(recipe, checkpoint, own, len(categories), same=same)
    agnostic = dict.fromkeys(("box_head.regressor", "box_head.sibling_regressor"), recipe.model.box_head.class_agnostic)
    agnostic |= dict.fromkeys(("mask_head.predictor", "mask_iou.predictor"), recipe.model.mask_head.class_agnostic)
    filled: dict[str, Tensor] = {}
    for key, value in own.items():
        part = next((part for part in CLASS_ROWS if f".{part}." in f".{key}"), "")
        if STATISTICS in key:
            filled[key] = theirs[key] if same and keep_classifier and key.endswith(RUNNING) else value
        elif part in CLASSIFIERS and not keep_classifier:
            filled[key] = value
        elif key not in theirs:
            raise _other_architecture(path, key, "is missing")
        else:
            rows = 0 if same or agnostic.get(part) else CLASS_ROWS.get(part, 0)
            filled[key] = _with_rows(path, key, value, theirs[key], source, len(checkpoint.categories), rows)
    left = [key for key in theirs if key not in own and STATISTICS not in key]
    if left:
        raise _other_architecture(path, left[0], "has no place")
    detector.load_state_dict(filled)
    known = len(source) - source.count(-1)
    classifier = "" if keep_classifier else "; the classifier starts anew, for it does not fit the recipe's loss"
    return f"weights of {path} ({known} of {len(source)} classes known by name{classifier})"


def _their_labels(ours: Sequence[Category], theirs: Sequence[Category]) -> list[int]:
    """For each of our categories the label of the same name there, -1 where there is none."""
    exact = {category.name: label for label, category in enumerate(theirs)}
    loose = {same_name(category.name): label for label, category in enumerate(theirs)}
    return [exact.get(category.name, loose.get(same_name(category.name), -1)) for category in ours]


def _same_classifier(
    recipe: Recipe, checkpoint: Checkpoint, own: Mapping[str, Tensor], classes: int, *, same: bool
) -> bool:
    """Whether logits mean the same there: loss, normalisation, and the logits that are no classes."""
    ours, other = recipe.classifier, checkpoint.recipe.classifier
    if (ours.loss, ours.normalized) != (other.loss, other.normalized):
        return False
    key = "stages.0.box_head.classifier.bias"
    if len(own[key]) - classes != len(checkpoint.state[key]) - len(checkpoint.categories):
        return False
    if ours.loss != "group-softmax":
        return True
    groups = f"stages.0{STATISTICS}groups"  # of each class; which logit is whose follows from it
    return same and torch.equal(own[groups], checkpoint.state[groups])


def _with_rows(
    path: Path, key: str, own: Tensor, theirs: Tensor, source: list[int], their_classes: int, rows: int
) -> Tensor:
    """Our tensor with theirs in it: as it is, or row by row where every class has ``rows`` of them."""
    classes, extra = len(source), len(own) - len(source) * rows if rows else 0
    if rows and (len(theirs) - their_classes * rows, *theirs.shape[1:]) == (extra, *own.shape[1:]):
        to = torch.tensor([label for label in range(classes) if source[label] >= 0], dtype=torch.int64)
        of = torch.tensor([label for label in source if label >= 0], dtype=torch.int64)
        filled = own.clone()
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
