"""Table 2 of the report: the challenge entry step by step, on LVIS v1, each row its predecessor and one thing more.

| recipe                 | schedule | box AP | mask AP | APr  | APc  | APf  |
|------------------------|----------|--------|---------|------|------|------|
| table2/01-mask-rcnn    | 2x       | 20.1   | 18.7    | 1.0  | 16.1 | 29.4 |
| table2/02-sync-bn      | 2x       | 20.2   | 18.9    | 0.7  | 16.0 | 30.3 |
| table2/03-carafe       | 2x       | 20.4   | 19.4    | 0.7  | 16.5 | 30.9 |
| table2/04-htc-lite     | 2x       | 23.6   | 21.9    | 1.1  | 19.8 | 33.5 |
| table2/05-tsd          | 2x       | 25.5   | 23.5    | 2.3  | 22.3 | 34.0 |
| table2/06-mask-scoring | 2x       | 25.6   | 23.9    | 2.8  | 22.4 | 35.0 |
| table2/07-augmentation | 45e      | 28.1   | 26.5    | 3.6  | 25.7 | 37.4 |
| table2/08-neck         | 45e      | 29.1   | 27.0    | 3.5  | 25.8 | 38.6 |
| table2/09-backbone     | 45e      | 32.1   | 29.9    | 4.2  | 29.4 | 41.8 |
| table2/10-seesaw       | 45e      | 39.8   | 36.8    | 25.5 | 35.6 | 42.9 |
| table2/11-finetune     | 1x       | 40.6   | 37.3    | 26.4 | 36.3 | 43.1 |
| table2/12-tta          | -        | 41.5   | 38.8    | 26.4 | 38.3 | 44.9 |

The step that a row takes is a function of the recipe before it, so that the same steps make the rows in miniature
(`tailseg.recipes.small`). What the rows cost and scored is in `tailseg.recipes.ladder`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tailseg.recipes import table1
from tailseg.recipes.schema import Recipe
from tailseg.recipes.values import changed

CASCADE = (  # Cascade R-CNN: later stages are stricter, work on finer deltas and weigh less
    {"iou": 0.5, "stds": (0.1, 0.1, 0.2, 0.2), "weight": 1.0, "mask_weight": 0.0},
    {"iou": 0.6, "stds": (0.05, 0.05, 0.1, 0.1), "weight": 0.5, "mask_weight": 0.0},
    {"iou": 0.7, "stds": (0.033, 0.033, 0.067, 0.067), "weight": 0.25, "mask_weight": 1.0},
)


def mask_rcnn() -> Recipe:
    """Row 1: Mask R-CNN R50-FPN with softmax cross-entropy, multi-scale, random sampler, 2x."""
    return changed(table1.cross_entropy(), {"schedule.epochs": 24, "schedule.milestones": (16, 22)})


def with_sync_bn(recipe: Recipe) -> Recipe:
    """Row 2: batch norm learns in the backbone's trained stages and is put into the mask head, over all processes."""
    return changed(recipe, {"model.backbone.train_norm": True, "model.mask_head.norm": True})


def with_carafe(recipe: Recipe) -> Recipe:
    """Row 3: the mask head's maps are upsampled by CARAFE."""
    return changed(recipe, {"model.mask_head.upsample": "carafe"})


def with_htc_lite(recipe: Recipe) -> Recipe:
    """Row 4: three box stages, a context encoder, one mask head, in the last stage (report, section 1.2).

    As in the cascade, training takes twice the proposals, and a RoI is positive by its own overlap alone.
    """
    changes = {
        "model.rpn.post_nms_train": 2 * recipe.model.rpn.post_nms_train,
        "model.rpn.box_beta": 1 / 9,
        "model.rpn.inside_image": True,
        "model.box_head.class_agnostic": True,
        "model.box_head.box_beta": 1.0,
        "model.box_head.low_quality": False,
        "model.context.weight": 3.0,
        "model.context.norm": recipe.model.mask_head.norm,
        "model.stages": CASCADE,
    }
    return changed(recipe, changes)


def with_tsd(recipe: Recipe) -> Recipe:
    """Row 5: TSD instead of the box heads of all three stages, and gradients clipped at a norm of 35."""
    stages = {f"model.stages.{stage}.tsd": True for stage in range(len(recipe.model.stages))}
    return changed(recipe, {**stages, "optimizer.clip": min(35.0, recipe.optimizer.clip or 35.0)})


def with_mask_scoring(recipe: Recipe) -> Recipe:
    """Row 6: a mask-IoU head, whose score ranks the masks."""
    return changed(recipe, {"model.mask_iou.weight": 0.5})


def with_augmentation(recipe: Recipe) -> Recipe:
    """Row 7: InstaBoost, the longer edge 768 to 1792 px, crops of 1280 px, tested at 1280 px; 45 epochs."""
    changes = {
        "data.instaboost": 0.5,
        "data.long_edges": (768, 1792),
        "data.crop": 1280,
        "data.test_short_edge": 1280,
        "data.long_edge": 1280,
        "schedule.epochs": 45,
        "schedule.milestones": (30, 40),
    }
    return changed(recipe, changes)


def with_enhanced_fpg(recipe: Recipe) -> Recipe:
    """Row 8: a feature pyramid grid that upsamples before deformable convolutions and downsamples by CARAFE."""
    return changed(recipe, {"model.neck": {"kind": "fpg", "pathways": 9, "deformable": True, "carafe": True}})


def with_resnest(recipe: Recipe) -> Recipe:
    """Row 9: ResNeSt-200 with deformable convolutions in its last three stages, and the pixel statistics it knows."""
    changes = {
        "model.backbone.name": "resnest200e",
        "model.backbone.deformable_stages": (2, 3, 4),
        "model.pixel_mean": (123.68, 116.779, 103.939),
        "model.pixel_std": (58.393, 57.12, 57.375),
    }
    return changed(recipe, changes)


def with_seesaw(recipe: Recipe) -> Recipe:
    """Row 10: Seesaw Loss, normalised classifiers and objectness in all stages; no constraint on TSD's classes."""
    return changed(recipe, {"model.tsd.constrain_classes": False, **table1.SEESAW})


def with_finetuning(recipe: Recipe) -> Recipe:
    """Row 11: row 10's model frozen, second classification branches learn with repeat factor sampling, 1x."""
    changes = {
        "finetune.enabled": True,
        "data.sampler": "repeat-factor",
        "schedule.epochs": 12,
        "schedule.milestones": (8, 11),
    }
    return changed(recipe, changes)


def with_tta(recipe: Recipe) -> Recipe:
    """Row 12: row 11's model tested on five sizes from 1200 to 2000 px (in miniature 120 to 200), mirrored too."""
    return changed(recipe, {"test.tta": True})


Step = Callable[[Recipe], Recipe]
ROW_1 = "01-mask-rcnn"
STEPS: dict[str, Step] = {
    ROW_1: lambda recipe: recipe,
    "02-sync-bn": with_sync_bn,
    "03-carafe": with_carafe,
    "04-htc-lite": with_htc_lite,
    "05-tsd": with_tsd,
    "06-mask-scoring": with_mask_scoring,
    "07-augmentation": with_augmentation,
    "08-neck": with_enhanced_fpg,
    "09-backbone": with_resnest,
    "10-seesaw": with_seesaw,
    "11-finetune": with_finetuning,
    "12-tta": with_tta,
}


def rows(table: str, first: Callable[[], Recipe], steps: Mapping[str, Step] = STEPS) -> dict[str, Callable[[], Recipe]]:
    """Every row as a function, by its name ``TABLE/NN-...``, where ``first`` makes what row 1 starts from."""
    return {f"{table}/{name}": _row(table, name, first, steps) for name in steps}


def cascade_mask_rcnn() -> Recipe:
    """Row 1 as a Cascade Mask R-CNN, which public checkpoints are: three stages, a mask head in each."""
    stages = [{**stage, "mask_weight": stage["weight"]} for stage in CASCADE]
    changes = {"name": "table2/cascade-mask-rcnn", "model.stages": stages, "model.context.weight": 0.0}
    return changed(with_htc_lite(mask_rcnn()), changes)


def htc() -> Recipe:
    """Hybrid Task Cascade (arXiv 1901.07518) without its semantic branch: mask heads are chained and learn in turn."""
    changes = {
        "name": "htc",
        "model.mask_head.flow": True,
        "model.mask_head.interleaved": True,
        "schedule.epochs": 20,
        "schedule.milestones": (16, 19),
    }
    return changed(cascade_mask_rcnn(), changes)


def scnet() -> Recipe:
    """SCNet (arXiv 2012.10150) without its semantic branch: one deep mask head, a context encoder, a feature relay."""
    stages = [{**stage, "mask_weight": 0.0} for stage in CASCADE]
    stages[-1]["mask_weight"] = 1.75  # the sum of the stages' weights
    changes = {
        "name": "scnet",
        "model.stages": stages,
        "model.mask_head.convs": 12,
        "model.mask_head.residual": True,
        "model.context.weight": 3.0,
        "model.context.residual": True,
        "model.relay.enabled": True,
        "schedule.epochs": 20,
        "schedule.milestones": (16, 19),
    }
    return changed(cascade_mask_rcnn(), changes)


def _row(table: str, name: str, first: Callable[[], Recipe], steps: Mapping[str, Step]) -> Callable[[], Recipe]:
    def build() -> Recipe:
        recipe = first()
        for step, change in steps.items():
            recipe = change(recipe)
            if step == name:
                break
        return changed(recipe, {"name": f"{table}/{name}"})

    build.__doc__ = steps[name].__doc__ if name != ROW_1 else first.__doc__
    return build
