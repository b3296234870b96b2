"""The detector that a recipe's sections `model`, `classifier`, `test` and `finetune` describe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from tailseg.errors import UserError
from tailseg.layers.conv import train_fast
from tailseg.losses import CLASSIFICATIONS, Classification, ClassStatistics
from tailseg.model.backbone import Backbone
from tailseg.model.box_head import ROI_SIZE, BoxHead, ClassBranch, RoISampler
from tailseg.model.context import ContextEncoder
from tailseg.model.detector import Detector, Neck, Stage
from tailseg.model.fpg import FPG
from tailseg.model.fpn import FPN
from tailseg.model.fpn_carafe import CarafeFPN
from tailseg.model.hrfpn import HRFPN
from tailseg.model.mask_head import MaskHead
from tailseg.model.mask_iou import MaskIouHead
from tailseg.model.matching import Matcher
from tailseg.model.pafpn import PAFPN
from tailseg.model.relay import FeatureRelay
from tailseg.model.rpn import RPN
from tailseg.model.semantic import SemanticBranch
from tailseg.model.tsd import TsdBoxHead
from tailseg.recipes.classifiers import ClassifierRecipe
from tailseg.recipes.model_section import NeckRecipe, StageRecipe
from tailseg.recipes.schema import Recipe
from tailseg.recipes.values import changed

OF_WEIGHTS = {"pretrained", "weights"}  # keys of a recipe's backbone that do not shape it
# Keys of a recipe's test section.
OF_DETECTOR = {"score_threshold", "nms_iou", "max_detections", "stage_average", "min_size"}


@contextmanager
def float32_by_default() -> Iterator[None]:
    """What is made without a type is float32, whatever `torch.set_default_dtype` was called with."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@float32_by_default()
def build_detector(recipe: Recipe, num_classes: int, statistics: ClassStatistics | None = None) -> Detector:
    """The detector of a recipe for C classes, with random weights (see `backbone.load_pretrained`).

    Args:
        recipe: its `model`, `classifier` and `test` sections are read.
        num_classes: C.
        statistics: of the training annotations; None for a detector whose state dict will be loaded.

    Raises:
        UserError: ``test.tau_norm`` does not go with the classifier.
    """
    _require_tau_norm_applies(recipe)
    model = recipe.model
    backbone = Backbone(**model.backbone.model_dump(exclude=OF_WEIGHTS))
    channels = model.neck.channels
    context = mask_iou = None
    if model.context.weight > 0:
        context = ContextEncoder(channels, num_classes, **model.context.model_dump(exclude={"weight"}))
    if model.mask_iou.weight > 0:
        agnostic = model.mask_head.class_agnostic
        options = model.mask_iou.model_dump(exclude={"weight"})
        mask_iou = MaskIouHead(channels, num_classes, class_agnostic=agnostic, **options)
    semantic = None
    if model.semantic.enabled:
        semantic = SemanticBranch(channels, channels, **model.semantic.model_dump(exclude={"enabled"}))
    neck = _build_neck(model.neck, backbone.channels)
    detector = Detector(
        backbone,
        neck,
        RPN(channels, **model.rpn.model_dump(), size_divisor=neck.divisor),
        [_build_stage(recipe, stage, num_classes, statistics) for stage in model.stages],
        context=context,
        context_weight=model.context.weight,
        mask_iou=mask_iou,
        mask_iou_weight=model.mask_iou.weight,
        semantic=semantic,
        relay=FeatureRelay(model.box_head.width, channels) if model.relay.enabled else None,
        **model.roi_pooling.model_dump(),
        pixel_mean=model.pixel_mean,
        pixel_std=model.pixel_std,
        **recipe.test.model_dump(include=OF_DETECTOR),
    )
    train_fast(detector)
    return detector


def stored_recipe(recipe: Recipe, detector: Detector) -> Recipe:
    """The recipe as its model file holds it: a backbone from a hub or a folder goes by the name of its architecture.

    Raises:
        UserError: timm makes another network of that name.
    """
    name, architecture = recipe.model.backbone.name, detector.backbone.architecture
    if name == architecture:
        return recipe
    stored = changed(recipe, {"model.backbone.name": architecture})
    with torch.device("meta"):
        same = Backbone(**stored.model.backbone.model_dump(exclude=OF_WEIGHTS)).state_dict()
    own = detector.backbone.state_dict()
    if {key: value.shape for key, value in same.items()} != {key: value.shape for key, value in own.items()}:
        raise UserError(
            f"model.backbone.name: '{name}' is no plain '{architecture}', so the model could not be loaded again; set "
            f"model.backbone.name={architecture} and its arguments in model.backbone.options"
        )
    return stored


def _build_neck(neck: NeckRecipe, in_channels: Sequence[int]) -> Neck:
    if neck.kind in ("fpn", "pafpn"):
        kind = FPN if neck.kind == "fpn" else PAFPN
        return kind(in_channels, neck.channels, norm=neck.norm)
    if neck.kind == "fpn-carafe":
        return CarafeFPN(in_channels, neck.channels)
    if neck.kind == "hrfpn":
        return HRFPN(in_channels, neck.channels)
    return FPG(in_channels, **neck.model_dump(exclude={"kind", "norm"}))


def _build_stage(recipe: Recipe, stage: StageRecipe, num_classes: int, statistics: ClassStatistics | None) -> Stage:
    box, channels = recipe.model.box_head, recipe.model.neck.channels
    matcher = Matcher(
        positive_iou=stage.iou, negative_iou=stage.iou, low_quality_iou=stage.iou if box.low_quality else None
    )
    classification = build_classification(recipe.classifier, num_classes, statistics)
    of_classes: dict[str, Any] = {
        "width": box.width,
        "normalized": recipe.classifier.normalized,
        "temperature": recipe.classifier.temperature,
        "tau_norm": recipe.test.tau_norm,
    }
    options = of_classes | {"class_agnostic": box.class_agnostic, "stds": stage.stds, "box_beta": box.box_beta}
    box_head: BoxHead | TsdBoxHead
    if stage.tsd:
        box_head = TsdBoxHead(channels, classification, **options, **recipe.model.tsd.model_dump())
    else:
        box_head = BoxHead(channels, classification, convs=box.convs, norm=box.norm, **options)
    mask_head = None
    if stage.mask_weight > 0:
        mask = recipe.model.mask_head
        flow = mask.flow and stage is not recipe.model.stages[0]
        keys = mask.model_dump(exclude={"flow", "interleaved"})
        mask_head = MaskHead(channels, num_classes, flow=flow, **keys)
    second_branch = None
    if recipe.finetune.enabled:
        second_branch = ClassBranch(
            channels * ROI_SIZE**2,
            build_classification(recipe.classifier, num_classes, statistics),
            hidden_layers=len(box_head.class_layers),
            **of_classes,
        )
    sampler = RoISampler(matcher, num_classes, num_samples=box.rois, max_positive=box.max_positive)
    return Stage(
        sampler,
        box_head,
        mask_head,
        second_branch=second_branch,
        weight=stage.weight,
        mask_weight=stage.mask_weight,
        interleaved=recipe.model.mask_head.interleaved,
    )


def build_classification(
    classifier: ClassifierRecipe, num_classes: int, statistics: ClassStatistics | None = None
) -> Classification:
    """The object that owns a classifier's logits, loss and scores."""
    kind = CLASSIFICATIONS[classifier.loss]
    options = classifier.model_dump(exclude=set(ClassifierRecipe.model_fields))
    if kind.needs_statistics:
        options["statistics"] = statistics
    return kind(num_classes, **options)


def _require_tau_norm_applies(recipe: Recipe) -> None:
    """Raise UserError where rows of the classifier have no norm to divide by, or are not those of the classes."""
    classifier, tau = recipe.classifier, recipe.test.tau_norm
    if tau > 0 and (classifier.normalized or not CLASSIFICATIONS[classifier.loss].tau_norm_applies):
        what = "a normalised classifier" if classifier.normalized else classifier.loss
        raise UserError(f"recipe: test.tau_norm = {tau:g} does not go with {what}; set it to 0")
