"""A recipe's `model` and `classifier` sections, made into a detector: the only place that reads them."""

from __future__ import annotations

from tailseg.losses import CLASSIFICATIONS, NEED_STATISTICS, Classification, ClassStatistics
from tailseg.model.backbone import Backbone
from tailseg.model.box_head import BoxHead, RoISampler
from tailseg.model.detector import Detector
from tailseg.model.fpn import FPN
from tailseg.model.mask_head import MaskHead
from tailseg.model.matching import Matcher
from tailseg.model.rpn import RPN
from tailseg.recipe import ClassifierRecipe, Recipe


def build_detector(recipe: Recipe, num_classes: int, statistics: ClassStatistics | None = None) -> Detector:
    """The detector of a recipe for C classes, with random weights (see `backbone.load_pretrained`).

    Args:
        recipe: its `model`, `classifier` and `test` sections are read.
        num_classes: C.
        statistics: of the training annotations; None for a detector whose state dict will be loaded.
    """
    model = recipe.model
    backbone = Backbone(
        model.backbone.name,
        frozen_stages=model.backbone.frozen_stages,
        train_norm=model.backbone.train_norm,
        options=model.backbone.options,
    )
    box = model.box_head
    matcher = Matcher(positive_iou=box.iou, negative_iou=box.iou, low_quality_iou=box.iou if box.low_quality else None)
    head = BoxHead(
        model.neck.channels,
        build_classification(recipe.classifier, num_classes, statistics),
        width=box.width,
        normalized=recipe.classifier.normalized,
        temperature=recipe.classifier.temperature,
        class_agnostic=box.class_agnostic,
        stds=box.stds,
        box_beta=box.box_beta,
        tau_norm=recipe.test.tau_norm,
    )
    return Detector(
        backbone,
        FPN(backbone.channels, model.neck.channels),
        RPN(model.neck.channels, **model.rpn.model_dump()),
        RoISampler(matcher, num_classes, slots=box.rois, max_positive=box.max_positive),
        head,
        MaskHead(model.neck.channels, num_classes, **model.mask_head.model_dump()),
        pixel_mean=model.pixel_mean,
        pixel_std=model.pixel_std,
        **recipe.test.model_dump(exclude={"tau_norm"}),
    )


def build_classification(
    classifier: ClassifierRecipe, num_classes: int, statistics: ClassStatistics | None = None
) -> Classification:
    """The object that owns a classifier's logits, loss and scores."""
    kind = CLASSIFICATIONS[classifier.loss]
    options = classifier.model_dump(exclude=set(ClassifierRecipe.model_fields))
    if kind in NEED_STATISTICS:
        options["statistics"] = statistics
    result: Classification = kind(num_classes, **options)
    return result
