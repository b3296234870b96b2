"""Table 1 of the report: Mask R-CNN R50-FPN on LVIS v1, 1x, multi-scale, random sampler.

| recipe               | box AP | mask AP | APr  | APc  | APf  |
|----------------------|--------|---------|------|------|------|
| table1/cross-entropy | 16.9   | 16.0    | 0.0  | 12.3 | 27.3 |
| table1/eql           | 19.3   | 18.4    | 1.8  | 17.1 | 27.1 |
| table1/seesaw        | 24.3   | 23.3    | 13.0 | 22.9 | 28.2 |
"""

from tailseg.recipes.schema import Recipe
from tailseg.recipes.values import changed

# Report, section 1.1: Seesaw Loss, normalised linear classifier and objectness branch.
SEESAW = {
    "classifier.loss": "seesaw",
    "classifier.normalized": True,
    "classifier.objectness": True,
    "classifier.p": 0.8,
    "classifier.q": 0.0,
}


def cross_entropy() -> Recipe:
    """Row 1: softmax cross-entropy over the classes and background. Every default of a recipe is this row's."""
    return Recipe(name="table1/cross-entropy")


def eql() -> Recipe:
    """Row 2: Equalization Loss over sigmoids, λ for LVIS v1."""
    changes = {"name": "table1/eql", "classifier.loss": "eql", "classifier.threshold": 1.1e-3}
    return changed(cross_entropy(), changes)


def seesaw() -> Recipe:
    """Row 3: Seesaw Loss, normalised linear classifier and objectness branch (report, section 1.1)."""
    return changed(cross_entropy(), {"name": "table1/seesaw", **SEESAW})
