"""Recipes for a laptop: EfficientNet-Lite0, 64 channels, small images, AdamW; the same losses as Table 1."""

from tailseg.recipe import (
    BackboneRecipe,
    BoxHeadRecipe,
    DataRecipe,
    MaskHeadRecipe,
    MaskIouRecipe,
    ModelRecipe,
    NeckRecipe,
    OptimizerRecipe,
    Recipe,
    RpnRecipe,
    ScheduleRecipe,
    TrainingRecipe,
    TsdRecipe,
)
from tailseg.recipes import table1


def cross_entropy() -> Recipe:
    """A hundred photographs of 320 px learnt in well under an hour on two cores."""
    return Recipe(
        name="small/cross-entropy",
        model=ModelRecipe(
            backbone=BackboneRecipe(name="tf_efficientnet_lite0", frozen_stages=2),
            neck=NeckRecipe(channels=64),
            rpn=RpnRecipe(anchor_scale=4.0, pre_nms_train=500, pre_nms_test=500, post_nms_train=500, post_nms_test=300),
            box_head=BoxHeadRecipe(width=256, class_agnostic=True, rois=128, max_positive=32),
            mask_head=MaskHeadRecipe(channels=64, convs=4, class_agnostic=True),
        ),
        data=DataRecipe(
            batch_per_device=4, short_edges=(256, 288, 320), test_short_edge=320, long_edge=384, mask_grid=112
        ),
        optimizer=OptimizerRecipe(name="adamw", lr=5e-4, reference_batch=4, weight_decay=0.01, clip=10.0),
        schedule=ScheduleRecipe(epochs=40, milestones=(28, 36), warmup_steps=100, warmup_factor=0.01),
        training=TrainingRecipe(evaluate_every=10),
    )


def seesaw() -> Recipe:
    """The same with Seesaw Loss, normalised linear classifier and objectness branch."""
    return _with_seesaw(cross_entropy(), "small/seesaw")


def demo_cross_entropy() -> Recipe:
    """The built-in data set at 128 px, a few minutes on two cores."""
    base = cross_entropy()
    return base.model_copy(
        update={
            "name": "demo/cross-entropy",
            "model": base.model.model_copy(
                update={
                    "rpn": base.model.rpn.model_copy(update={"pre_nms_train": 200, "post_nms_train": 200}),
                    "box_head": base.model.box_head.model_copy(update={"rois": 64, "max_positive": 16}),
                    "mask_head": base.model.mask_head.model_copy(update={"convs": 2}),
                }
            ),
            "data": DataRecipe(
                batch_per_device=8, short_edges=(128,), test_short_edge=128, long_edge=128, mask_grid=56
            ),
            # SGD, as in the report: Adam gives every weight steps of one size, however rarely its class is seen, and so
            # hides half of what a long tail does (docs/results/table1.md).
            "optimizer": OptimizerRecipe(lr=0.05, reference_batch=8, clip=1.0),
            "schedule": ScheduleRecipe(epochs=3, milestones=(2,), warmup_steps=100, warmup_factor=0.01),
            "training": TrainingRecipe(evaluate_every=3),
        }
    )


def demo_seesaw() -> Recipe:
    """The same with Seesaw Loss, normalised linear classifier and objectness branch."""
    return _with_seesaw(demo_cross_entropy(), "demo/seesaw")


def demo_mask_rcnn() -> Recipe:
    """Row 1 in miniature: `demo/cross-entropy`, clipped in emergencies only, with narrow heads for what later rows add.

    A clip that always bites would weigh on the rows unequally: the more losses a row has, the longer is its gradient.
    """
    base = demo_cross_entropy()
    changes = {"tsd": TsdRecipe(shift_width=64), "mask_iou": MaskIouRecipe(channels=64, width=256)}
    return base.model_copy(
        update={
            "model": base.model.model_copy(update=changes),
            "optimizer": base.optimizer.model_copy(update={"lr": 0.0125, "clip": 10.0}),
        }
    )


def _with_seesaw(recipe: Recipe, name: str) -> Recipe:
    return recipe.model_copy(update={"name": name, "classifier": table1.seesaw().classifier})
