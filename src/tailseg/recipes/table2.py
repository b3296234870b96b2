"""Table 2 of the report: the challenge entry step by step, on LVIS v1, each row its predecessor and one thing more.

| recipe                 | schedule | box AP | mask AP | APr | APc  | APf  |
|------------------------|----------|--------|---------|-----|------|------|
| table2/01-mask-rcnn    | 2x       | 20.1   | 18.7    | 1.0 | 16.1 | 29.4 |
| table2/02-sync-bn      | 2x       | 20.2   | 18.9    | 0.7 | 16.0 | 30.3 |
| table2/03-carafe       | 2x       | 20.4   | 19.4    | 0.7 | 16.5 | 30.9 |
| table2/04-htc-lite     | 2x       | 23.6   | 21.9    | 1.1 | 19.8 | 33.5 |
| table2/05-tsd          | 2x       | 25.5   | 23.5    | 2.3 | 22.3 | 34.0 |
| table2/06-mask-scoring | 2x       | 25.6   | 23.9    | 2.8 | 22.4 | 35.0 |

The step that a row takes is a function of the recipe before it, so that the same steps make the rows in miniature
(`tailseg.recipes.small`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tailseg.recipe import Recipe, ScheduleRecipe, StageRecipe
from tailseg.recipes import table1

CASCADE = (  # Cascade R-CNN: later stages are stricter, work on finer deltas and weigh less
    StageRecipe(iou=0.5, stds=(0.1, 0.1, 0.2, 0.2), weight=1.0, mask_weight=0.0),
    StageRecipe(iou=0.6, stds=(0.05, 0.05, 0.1, 0.1), weight=0.5, mask_weight=0.0),
    StageRecipe(iou=0.7, stds=(0.033, 0.033, 0.067, 0.067), weight=0.25, mask_weight=1.0),
)


def mask_rcnn() -> Recipe:
    """Row 1: Mask R-CNN R50-FPN with softmax cross-entropy, multi-scale, random sampler, 2x."""
    return table1.cross_entropy().model_copy(update={"schedule": ScheduleRecipe(epochs=24, milestones=(16, 22))})


def with_sync_bn(recipe: Recipe) -> Recipe:
    """Row 2: batch norm learns in the backbone's trained stages and is put into the mask head, over all processes."""
    model = recipe.model
    changes = {
        "backbone": model.backbone.model_copy(update={"train_norm": True}),
        "mask_head": model.mask_head.model_copy(update={"norm": True}),
    }
    return _with_model(recipe, changes)


def with_carafe(recipe: Recipe) -> Recipe:
    """Row 3: the mask head's maps are upsampled by CARAFE."""
    return _with_model(recipe, {"mask_head": recipe.model.mask_head.model_copy(update={"upsample": "carafe"})})


def with_htc_lite(recipe: Recipe) -> Recipe:
    """Row 4: three box stages, a context encoder, one mask head, in the last stage (report, section 1.2).

    As in the cascade, training takes twice the proposals, and a RoI is positive by its own overlap alone.
    """
    model = recipe.model
    rpn = {"post_nms_train": 2 * model.rpn.post_nms_train, "box_beta": 1 / 9, "inside_image": True}
    changes = {
        "rpn": model.rpn.model_copy(update=rpn),
        "box_head": model.box_head.model_copy(update={"class_agnostic": True, "box_beta": 1.0, "low_quality": False}),
        "context": model.context.model_copy(update={"weight": 3.0, "norm": model.mask_head.norm}),
        "stages": CASCADE,
    }
    return _with_model(recipe, changes)


def with_tsd(recipe: Recipe) -> Recipe:
    """Row 5: TSD instead of the box heads of all three stages, and gradients clipped at a norm of 35."""
    stages = tuple(stage.model_copy(update={"tsd": True}) for stage in recipe.model.stages)
    clip = min(35.0, recipe.optimizer.clip or 35.0)
    clipped = recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update={"clip": clip})})
    return _with_model(clipped, {"stages": stages})


def with_mask_scoring(recipe: Recipe) -> Recipe:
    """Row 6: a mask-IoU head, by whose word masks are ranked."""
    return _with_model(recipe, {"mask_iou": recipe.model.mask_iou.model_copy(update={"weight": 0.5})})


ROW_1 = "01-mask-rcnn"
STEPS: dict[str, Callable[[Recipe], Recipe]] = {
    ROW_1: lambda recipe: recipe,
    "02-sync-bn": with_sync_bn,
    "03-carafe": with_carafe,
    "04-htc-lite": with_htc_lite,
    "05-tsd": with_tsd,
    "06-mask-scoring": with_mask_scoring,
}


def rows(table: str, first: Callable[[], Recipe]) -> dict[str, Callable[[], Recipe]]:
    """Every row as a function, by its name ``TABLE/NN-...``, where ``first`` makes what row 1 starts from."""
    return {f"{table}/{name}": _row(table, name, first) for name in STEPS}


def cascade_mask_rcnn() -> Recipe:
    """Row 1 as a Cascade Mask R-CNN, which public checkpoints are: three stages, a mask head in each."""
    htc_lite = with_htc_lite(mask_rcnn())
    stages = tuple(stage.model_copy(update={"mask_weight": stage.weight}) for stage in CASCADE)
    changes = {"stages": stages, "context": mask_rcnn().model.context}
    return _with_model(htc_lite, changes).model_copy(update={"name": "table2/cascade-mask-rcnn"})


def _row(table: str, name: str, first: Callable[[], Recipe]) -> Callable[[], Recipe]:
    def build() -> Recipe:
        recipe = first()
        for step, change in STEPS.items():
            recipe = change(recipe)
            if step == name:
                break
        return recipe.model_copy(update={"name": f"{table}/{name}"})

    build.__doc__ = STEPS[name].__doc__ if name != ROW_1 else first.__doc__
    return build


def _with_model(recipe: Recipe, changes: Mapping[str, object]) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=changes)})
