"""Recipes for a laptop: EfficientNet-Lite0, 64 channels, small images, AdamW; the same losses as Table 1."""

from tailseg.recipes import table1, table2
from tailseg.recipes.schema import Recipe
from tailseg.recipes.values import changed


def cross_entropy() -> Recipe:
    """A hundred photographs of 320 px learnt in well under an hour on two cores."""
    changes = {
        "name": "small/cross-entropy",
        "model.backbone.name": "tf_efficientnet_lite0",
        "model.backbone.frozen_stages": 2,
        "model.pixel_mean": (127.5, 127.5, 127.5),  # the weights were trained with these
        "model.pixel_std": (127.5, 127.5, 127.5),
        "model.neck.channels": 64,
        "model.rpn.anchor_scale": 4.0,
        "model.rpn.pre_nms_train": 500,
        "model.rpn.pre_nms_test": 500,
        "model.rpn.post_nms_train": 500,
        "model.rpn.post_nms_test": 300,
        "model.box_head.width": 256,
        "model.box_head.class_agnostic": True,
        "model.box_head.rois": 128,
        "model.box_head.max_positive": 32,
        "model.mask_head.channels": 64,
        "model.mask_head.class_agnostic": True,
        "data.batch_per_device": 4,
        "data.short_edges": (256, 288, 320),
        "data.test_short_edge": 320,
        "data.long_edge": 384,
        "optimizer.name": "adamw",
        "optimizer.lr": 5e-4,
        "optimizer.reference_batch": 4,
        "optimizer.weight_decay": 0.01,
        "optimizer.clip": 10.0,
        "schedule.epochs": 40,
        "schedule.milestones": (28, 36),
        "schedule.warmup_steps": 100,
        "schedule.warmup_factor": 0.01,
        "training.evaluate_every": 10,
    }
    return changed(table1.cross_entropy(), changes)


def seesaw() -> Recipe:
    """The same with Seesaw Loss, normalised linear classifier and objectness branch."""
    return changed(cross_entropy(), {"name": "small/seesaw", **table1.SEESAW})


def demo_cross_entropy() -> Recipe:
    """The built-in data set at 128 px, a quarter of an hour on two cores.

    SGD, as in the report: Adam gives every weight steps of one size, however rarely its class is seen, and so hides
    half of what a long tail does (docs/results/table1.md). The gradient is always clipped, so that every method makes
    steps of one length. An image may have 30 detections, a quarter of the set's 120 classes, as LVIS allows 300 for
    1,203: with more, what is wrong crowds nothing out, and the tail costs little (docs/results/table1.md).
    """
    changes = {
        "name": "demo/cross-entropy",
        # Not those of the weights: the recorded tables were made with these.
        "model.pixel_mean": (123.675, 116.28, 103.53),
        "model.pixel_std": (58.395, 57.12, 57.375),
        "model.rpn.pre_nms_train": 200,
        "model.rpn.post_nms_train": 200,
        "model.box_head.rois": 64,
        "model.box_head.max_positive": 16,
        "model.mask_head.convs": 2,
        "data.batch_per_device": 8,
        "data.short_edges": (128,),
        "data.test_short_edge": 128,
        "data.long_edge": 128,
        "data.mask_grid": 56,
        "optimizer.name": "sgd",
        "optimizer.lr": 0.05,
        "optimizer.reference_batch": 8,
        "optimizer.weight_decay": 1e-4,
        "optimizer.clip": 1.0,
        "schedule.epochs": 2,
        "schedule.milestones": (),
        "training.evaluate_every": 2,
        "test.max_detections": 30,
    }
    return changed(cross_entropy(), changes)


def demo_seesaw() -> Recipe:
    """The same with Seesaw Loss, normalised linear classifier and objectness branch."""
    return changed(demo_cross_entropy(), {"name": "demo/seesaw", **table1.SEESAW})


def demo_mask_rcnn() -> Recipe:
    """Row 1 in miniature: `demo/cross-entropy`, clipped in emergencies only, with narrow heads for what later rows add.

    A clip that always bites would weigh on the rows unequally: the more losses a row has, the longer is its gradient.
    """
    changes = {
        "model.tsd.shift_width": 64,
        "model.mask_iou.channels": 64,
        "model.mask_iou.width": 256,
        "optimizer.lr": 0.0125,
        "optimizer.clip": 10.0,
    }
    return changed(demo_cross_entropy(), changes)


def demo_with_augmentation(recipe: Recipe) -> Recipe:
    """Row 7 in miniature: InstaBoost, the longer edge 77 to 179 px (0.6 to 1.4 times 128), crops of 128 px."""
    return changed(recipe, {"data.instaboost": 0.5, "data.long_edges": (77, 179), "data.crop": 128})


def demo_with_neck(recipe: Recipe) -> Recipe:
    """Row 8 in miniature: a grid of five pathways instead of nine."""
    return changed(table2.with_enhanced_fpg(recipe), {"model.neck.pathways": 5})


def demo_with_backbone(recipe: Recipe) -> Recipe:
    """Row 9 in miniature: EfficientNet-Lite2.

    Its convolutions stay plain: on maps of 4 x 4 and 8 x 8 cells there is little to deform, at three times the time.
    """
    return changed(recipe, {"model.backbone.name": "tf_efficientnet_lite2"})


def demo_with_finetuning(recipe: Recipe) -> Recipe:
    """Row 11 in miniature: one epoch, in which classes in less than 2 % of the images are repeated."""
    changes = {"data.repeat_threshold": 0.02, "schedule.epochs": 1, "schedule.milestones": ()}
    return changed(table2.with_finetuning(recipe), changes)


DEMO_STEPS = table2.STEPS | {
    "07-augmentation": demo_with_augmentation,
    "08-neck": demo_with_neck,
    "09-backbone": demo_with_backbone,
    "11-finetune": demo_with_finetuning,
}
