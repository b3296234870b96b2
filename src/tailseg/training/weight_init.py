"""Initial weights of a run from another model of ours, class by class where the classes differ.

So is fine-tuning begun, of all weights or (recipe section `finetune`) of second classification branches alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tailseg.checkpoint import Checkpoint, load_model, require_fit, require_type
from tailseg.data.annotations.annotations import Category
from tailseg.data.sources import same_name
from tailseg.errors import UserError
from tailseg.losses import CLASSIFICATIONS
from tailseg.model.build import build_detector
from tailseg.model.detector import Detector, Stage
from tailseg.model.pretrained import load_pretrained
from tailseg.recipes.schema import Recipe
from tailseg.recipes.values import FREE_FORM_KEYS, flatten

logger = logging.getLogger(__name__)

CLASS_ROWS = {  # rows of one class
    "box_head.classifier": 1,
    "box_head.regressor": 4,
    "box_head.sibling_classifier": 1,
    "box_head.sibling_regressor": 4,
    "second_branch.classifier": 1,
    "context.classifier": 1,
    "mask_head.predictor": 1,
    "mask_iou.predictor": 1,
}
# Those whose logits are the loss's own.
CLASSIFIERS = ("box_head.classifier", "box_head.sibling_classifier", "second_branch.classifier")
SECOND = ".second_branch."
STATISTICS = (".box_head.classification.", ".second_branch.classification.")  # what a loss knows of the classes
MEANING = (  # recipe keys, or their beginnings, that change what given weights compute
    *("model.backbone.norm_eps", "model.backbone.stride_in_1x1", "model.backbone.options"),
    *("model.backbone.res2net_pool", "model.mask_head.flow", "model.mask_head.residual"),
    "model.semantic.enabled",
    *("model.rpn.anchor_scale", "model.rpn.rounded_anchors", "model.rpn.fitted_strides", "model.roi_pooling."),
    *("model.stages.", "model.tsd.gamma", "model.context.residual", "model.pixel_", "classifier.temperature"),
    *("model.mask_head.upsample", "model.mask_head.normalized", "model.mask_head.temperature"),
)


def read_init(path: Path, recipe: Recipe, categories: Sequence[Category]) -> Checkpoint:
    """Read the model file that a run starts from, and compare it before anything is built that takes memory.

    Raises:
        UserError: the file is no model, does not fit its own recipe, or its architecture is not the run's.
    """
    checkpoint = load_model(path)
    with torch.device("meta"):  # shapes and types alone
        theirs = build_detector(checkpoint.recipe, len(checkpoint.categories)).state_dict()
        require_fit(theirs, checkpoint.state, path)
        own = build_detector(recipe, len(categories)).state_dict()
        shapes = replace(checkpoint, state=theirs)
        # Where the layout of the logits counts, it is compared by its values, later.
        layout = CLASSIFICATIONS[recipe.classifier.loss].layout_buffers
        keep_classifier = not layout and _same_classifier(recipe, shapes, own, categories)
        _filled(own, shapes, recipe, categories, keep_classifier=keep_classifier)
    return checkpoint


def require_sound_start(recipe: Recipe, init: Path | None, *, resume: bool) -> None:
    """Check that a run has something to start from, before anything is read.

    Raises:
        UserError: `--resume` has an `--init` too, second branches have no model, frozen stages would be random, or the
            model has a semantic branch.
    """
    if resume:
        if init is not None:
            raise UserError(
                f"--init {init}: --resume goes on with the weights of the run itself; leave out one of the two"
            )
        return
    if recipe.model.semantic.enabled:
        raise UserError(
            "model.semantic: the semantic branch is for detection alone, as its training needs maps of stuff, which "
            "tailseg does not read; set model.semantic.enabled=false, or train recipe htc or scnet"
        )
    backbone = recipe.model.backbone
    if recipe.finetune.enabled and init is None:
        raise UserError(
            "finetune.enabled: adds classification branches to a trained model; name it with --init, such as "
            "--init runs/seesaw"
        )
    if init is None and not backbone.pretrained and backbone.frozen_stages >= 0:
        raise UserError(
            f"model.backbone.frozen_stages = {backbone.frozen_stages}: with model.backbone.pretrained=false these "
            "stages would stay at random weights; set model.backbone.frozen_stages=-1, or start from a model by --init"
        )
    trained_before = {"backbone"} if backbone.pretrained else set()
    random = [part for part in recipe.training.freeze if init is None and part not in trained_before]
    if random:
        raise UserError(
            f"training.freeze: {random[0]} would stay at random weights; leave it out, or start from a model by --init"
        )


def init_weights(
    detector: Detector,
    recipe: Recipe,
    categories: Sequence[Category],
    checkpoint: Checkpoint | None,
    *,
    resume: bool = False,
) -> str:
    """Give a new detector the weights that a run starts with; returns what they are, for the log.

    A run that is resumed gets its own later: ImageNet's need not be there.

    Raises:
        UserError: as `start_from` and `load_pretrained`.
    """
    if resume:
        return "weights of the run itself"
    if checkpoint is not None:
        return start_from(checkpoint, detector, recipe, categories)
    if recipe.model.backbone.pretrained:
        given = recipe.model.backbone.weights
        return f"backbone {load_pretrained(detector.backbone, None if given is None else Path(given).expanduser())}"
    return "random weights"


def start_from(checkpoint: Checkpoint, detector: Detector, recipe: Recipe, categories: Sequence[Category]) -> str:
    """Fill a detector with the weights of another model; returns one sentence that says what was taken.

    With the model's own categories all is taken. With others, rows that belong to a class go to the class of the same
    name, classes that the model does not know keep their random rows, and what its loss had counted is left behind.
    The classifier is taken only if it has the same loss and form.

    Second branches that the model has not got begin as copies of its classification, or as they are
    (`finetune.start`), and have counted nothing: what the sampler shows them is another distribution.

    Raises:
        UserError: its architecture is not the recipe's, or `finetune` would freeze a classifier that it does not have.
    """
    own = detector.state_dict()
    keep_classifier = _same_classifier(recipe, checkpoint, own, categories)
    filled = _filled(own, checkpoint, recipe, categories, keep_classifier=keep_classifier)
    path, source = checkpoint.path, _their_labels(categories, checkpoint.categories)
    if recipe.finetune.enabled:
        unknown = [category.name for category, label in zip(categories, source, strict=True) if label < 0]
        _require_whole(path, recipe, checkpoint, unknown, same_classifier=keep_classifier)
    detector.load_state_dict(filled)
    branches = ""
    if recipe.finetune.enabled:
        branches = "; second branches " + _start_branches(detector, recipe, there=_has_branches(checkpoint))
    known = len(source) - source.count(-1)
    classifier = "" if keep_classifier else "; the classifier starts again, for it does not fit the recipe's loss"
    others = _other_conventions(recipe, checkpoint)
    return f"weights of {path} ({known} of {len(source)} classes known by name{classifier}){branches}{others}"


def _other_conventions(recipe: Recipe, checkpoint: Checkpoint) -> str:
    """The settings of another value under which the weights were trained, as the rest of a sentence; may be empty."""
    ours, theirs = (flatten(r.model_dump(mode="json"), whole=FREE_FORM_KEYS) for r in (recipe, checkpoint.recipe))
    changed = [key for key in ours if key.startswith(MEANING) and key in theirs and ours[key] != theirs[key]]
    found = ", ".join(f"{key} = {theirs[key]} (here {ours[key]})" for key in changed)
    return f"; they were trained with {found}" if found else ""


def _filled(
    own: Mapping[str, Tensor],
    checkpoint: Checkpoint,
    recipe: Recipe,
    categories: Sequence[Category],
    *,
    keep_classifier: bool,
) -> dict[str, Tensor]:
    """A state dict of a detector with theirs in it; both may be on `meta`.

    Raises:
        UserError: the architectures differ.
    """
    path, theirs = checkpoint.path, checkpoint.state
    source = _their_labels(categories, checkpoint.categories)
    same = source == list(range(len(checkpoint.categories)))
    kind = CLASSIFICATIONS[recipe.classifier.loss]
    second_there = _has_branches(checkpoint)
    agnostic = dict.fromkeys(("box_head.regressor", "box_head.sibling_regressor"), recipe.model.box_head.class_agnostic)
    agnostic |= dict.fromkeys(("mask_head.predictor", "mask_iou.predictor"), recipe.model.mask_head.class_agnostic)
    filled: dict[str, Tensor] = {}
    for key, value in own.items():
        part = next((part for part in CLASS_ROWS if f".{part}." in f".{key}"), "")
        if SECOND in key and not second_there:
            filled[key] = value
        elif _of_statistics(key):
            filled[key] = theirs[key] if same and keep_classifier and key.endswith(kind.learned_buffers) else value
        elif part in CLASSIFIERS and not keep_classifier:
            filled[key] = value
        elif key not in theirs:
            raise _other_architecture(path, key, "is missing")
        else:
            require_type(key, value, theirs[key], path)
            rows = 0 if same or agnostic.get(part) else CLASS_ROWS.get(part, 0)
            filled[key] = _with_rows(path, key, value, theirs[key], source, len(checkpoint.categories), rows)
    # A semantic branch is not trained, so models that have it are trained on without.
    left = [key for key in theirs if key not in own and not _of_statistics(key) and not key.startswith("semantic.")]
    if left:
        raise _other_architecture(path, left[0], "has no place")
    return filled


def _has_branches(checkpoint: Checkpoint) -> bool:
    return any(SECOND in key for key in checkpoint.state)


def _start_branches(detector: Detector, recipe: Recipe, *, there: bool) -> str:
    """Give second branches their first weights, if they are not ``there``; returns which they have."""
    if there:
        return "go on from the model's own"
    if recipe.finetune.start == "random":
        return "start from random weights"
    for stage in detector.stages:
        assert isinstance(stage, Stage)
        assert stage.second_branch is not None
        own = (*stage.second_branch.layers, stage.second_branch.classifier)
        for layer, trained in zip(own, (*stage.box_head.class_layers, stage.box_head.classifier), strict=True):
            layer.load_state_dict(trained.state_dict())
    return "start as copies of its classification"


def _of_statistics(key: str) -> bool:
    return any(part in key for part in STATISTICS)


def _their_labels(ours: Sequence[Category], theirs: Sequence[Category]) -> list[int]:
    """For each of our categories the label of the same name there, -1 where there is none."""
    exact = {category.name: label for label, category in enumerate(theirs)}
    loose = {same_name(category.name): label for label, category in enumerate(theirs)}
    return [exact.get(category.name, loose.get(same_name(category.name), -1)) for category in ours]


def _same_classifier(
    recipe: Recipe, checkpoint: Checkpoint, own: Mapping[str, Tensor], categories: Sequence[Category]
) -> bool:
    """Return whether logits mean the same there: loss, normalisation, and the logits that are no classes."""
    classes = len(categories)
    same = _their_labels(categories, checkpoint.categories) == list(range(len(checkpoint.categories)))
    ours, other = recipe.classifier, checkpoint.recipe.classifier
    if (ours.loss, ours.normalized) != (other.loss, other.normalized):
        return False
    key = "stages.0.box_head.classifier.bias"
    if len(own[key]) - classes != len(checkpoint.state[key]) - len(checkpoint.categories):
        return False
    layout = [f"stages.0{STATISTICS[0]}{name}" for name in CLASSIFICATIONS[ours.loss].layout_buffers]
    return not layout or (same and all(torch.equal(own[key], checkpoint.state[key]) for key in layout))


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


def _require_whole(
    path: Path, recipe: Recipe, checkpoint: Checkpoint, unknown: Sequence[str], *, same_classifier: bool
) -> None:
    """Raise UserError unless frozen weights mean in this run what they meant in the model's own."""
    if unknown:
        others = f" and {len(unknown) - 1} more of the data's classes" if len(unknown) > 1 else ""
        raise UserError(
            f"--init {path}: does not know '{unknown[0]}'{others}, and with finetune.enabled it learns no new class; "
            "train a model on this data first"
        )
    ours, theirs = (flatten(r.model_dump(mode="json"), whole=FREE_FORM_KEYS) for r in (recipe, checkpoint.recipe))
    for of_stage in ("stds", "tsd"):
        for values in (ours, theirs):
            values |= {f"model.stages.{i}.{of_stage}": own[of_stage] for i, own in enumerate(values["model.stages"])}
    keys = ("classifier.loss", "classifier.normalized", *(key for key in ours if key.startswith(MEANING)))
    changed = [key for key in keys if ours[key] != theirs.get(key)]
    if changed or not same_classifier:
        key = changed[0] if changed else "classifier"
        what = f"has {key} = {theirs.get(key)}, the recipe {ours[key]}" if changed else "has another form of classifier"
        raise UserError(
            f"--init {path}: {what}, and finetune.enabled leaves the model as it is; set the recipe's {key} to the "
            f"model's (tailseg recipes show {path})"
        )


def _other_architecture(path: Path, key: str, what: str) -> UserError:
    return UserError(
        f"--init {path}: '{key}' {what}: the recipe builds another architecture; train with the model's own recipe "
        f"(tailseg train {path} --init {path} ...)"
    )
