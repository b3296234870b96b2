"""Recipes for a laptop: EfficientNet-Lite0, 64 channels, small images, AdamW; the same losses as Table 1."""

from tailseg.recipes import table1, table2
from tailseg.recipes.schema import (
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


def demo_with_augmentation(recipe: Recipe) -> Recipe:
    """Row 7 in miniature: InstaBoost, the longer edge 77 to 179 px (0.6 to 1.4 times 128), crops of 128 px."""
    changes = {"instaboost": 0.5, "long_edges": (77, 179), "crop": 128}
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=changes)})


def demo_with_neck(recipe: Recipe) -> Recipe:
    """Row 8 in miniature: a grid of five pathways instead of nine."""
    grid = table2.with_enhanced_fpg(recipe)
    neck = grid.model.neck.model_copy(update={"pathways": 5})
    return grid.model_copy(update={"model": grid.model.model_copy(update={"neck": neck})})


def demo_with_backbone(recipe: Recipe) -> Recipe:
    """Row 9 in miniature: EfficientNet-Lite2.

    Its convolutions stay plain: on maps of 4 x 4 and 8 x 8 cells there is little to deform, at thrice the time.
    """
    changes = {"backbone": recipe.model.backbone.model_copy(update={"name": "tf_efficientnet_lite2"})}
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=changes)})


def demo_with_finetuning(recipe: Recipe) -> Recipe:
    """Row 11 in miniature: one epoch, in which classes in less than 2 % of the images are repeated."""
    finetuned = table2.with_finetuning(recipe)
    changes = {
        "data": finetuned.data.model_copy(update={"repeat_threshold": 0.02}),
        "schedule": recipe.schedule.model_copy(update={"epochs": 1, "milestones": ()}),
    }
    return finetuned.model_copy(update=changes)


def demo_with_tta(recipe: Recipe) -> Recipe:
    """Row 12 in miniature: sizes from 120 to 200 px (as 1200 to 2000 to 1280), each of them mirrored too."""
    test = recipe.test.model_copy(update={"tta": True, "tta_long_edges": (120, 140, 160, 180, 200)})
    return recipe.model_copy(update={"test": test})


DEMO_STEPS = table2.STEPS | {
    "07-augmentation": demo_with_augmentation,
    "08-neck": demo_with_neck,
    "09-backbone": demo_with_backbone,
    "11-finetune": demo_with_finetuning,
    "12-tta": demo_with_tta,
}


def _with_seesaw(recipe: Recipe, name: str) -> Recipe:
    return recipe.model_copy(update={"name": name, "classifier": table1.seesaw().classifier})
