"""Table 1 of the report: Mask R-CNN R50-FPN on LVIS v1, 1x, multi-scale, random sampler.

| recipe               | box AP | mask AP | APr  | APc  | APf  |
|----------------------|--------|---------|------|------|------|
| table1/cross-entropy | 16.9   | 16.0    | 0.0  | 12.3 | 27.3 |
| table1/seesaw        | 24.3   | 23.3    | 13.0 | 22.9 | 28.2 |
"""

from tailseg.recipe import ClassifierRecipe, Recipe


def cross_entropy() -> Recipe:
    """Row 1: softmax cross-entropy over the classes and background. Every default of a recipe is this row's."""
    return Recipe(name="table1/cross-entropy")


def seesaw() -> Recipe:
    """Row 3: Seesaw Loss, normalised linear classifier and objectness branch (report, section 1.1)."""
    return cross_entropy().model_copy(
        update={
            "name": "table1/seesaw",
            "classifier": ClassifierRecipe(loss="seesaw", normalized=True, objectness=True, p=0.8, q=0.0),
        }
    )
