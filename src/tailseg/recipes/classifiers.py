"""The classifier section of a recipe: one kind of section a loss."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, model_validator

from tailseg.recipes.section import Section


class ClassifierRecipe(Section):
    """Classification of the box head: the keys that all losses share. `loss` chooses the section's other keys."""

    loss: str
    normalized: bool = False
    """Normalised linear layer (report, Eq. 3)."""
    temperature: float = Field(20.0, gt=0)
    """τ of Eq. 3."""


class CrossEntropyRecipe(ClassifierRecipe):
    """`tailseg.losses.CrossEntropyClassification`."""

    loss: Literal["cross-entropy"] = "cross-entropy"


class SeesawRecipe(ClassifierRecipe):
    """`tailseg.losses.SeesawClassification`."""

    loss: Literal["seesaw"] = "seesaw"
    objectness: bool = True
    """The objectness branch (Eq. 4); without it background is one more class."""
    p: float = Field(0.8, ge=0)
    """Mitigation exponent (Eq. 2)."""
    q: float = Field(0.0, ge=0)
    """Compensation exponent of the conference paper; the report has none."""


class EqlRecipe(ClassifierRecipe):
    """`tailseg.losses.EqualizationClassification`."""

    loss: Literal["eql"] = "eql"
    threshold: float = Field(1.1e-3, ge=0, le=1)
    """λ: classes in a smaller share of the training images are spared."""


class EqlV2Recipe(ClassifierRecipe):
    """`tailseg.losses.EqualizationV2Classification`."""

    loss: Literal["eql-v2"] = "eql-v2"
    gamma: float = Field(12.0, gt=0)
    """Slope of the mapping from the gradient ratio to the weights."""
    mu: float = Field(0.8, ge=0)
    """Gradient ratio at its middle."""
    alpha: float = Field(4.0, ge=0)
    """Largest addition to a positive gradient's weight of 1."""


class GroupSoftmaxRecipe(ClassifierRecipe):
    """`tailseg.losses.GroupSoftmaxClassification`."""

    loss: Literal["group-softmax"] = "group-softmax"
    thresholds: tuple[int, ...] = Field((10, 100, 1000), min_length=1)
    """Training instances at which the next group of classes begins."""
    others_ratio: float = Field(8.0, gt=0)
    """RoIs of other groups that count, for each of the group's own."""

    @model_validator(mode="after")
    def _thresholds_rise(self) -> GroupSoftmaxRecipe:
        if list(self.thresholds) != sorted(set(self.thresholds)):
            raise ValueError(f"thresholds must be rising numbers, received {list(self.thresholds)}")
        return self


class FederatedRecipe(ClassifierRecipe):
    """`tailseg.losses.FederatedClassification`."""

    loss: Literal["federated"] = "federated"
    sampled: int = Field(50, ge=1)
    """Classes of a step, those present included."""
    power: float = Field(0.5, ge=0)
    """Other classes are drawn in proportion to their image count to this power."""


class ClassBalancedRecipe(ClassifierRecipe):
    """`tailseg.losses.ClassBalancedClassification`."""

    loss: Literal["class-balanced"] = "class-balanced"
    beta: float = Field(0.999, ge=0, lt=1)
    """β of the effective number of samples; 0 leaves cross-entropy."""


class LdamRecipe(ClassifierRecipe):
    """`tailseg.losses.LDAMClassification`."""

    loss: Literal["ldam"] = "ldam"
    max_margin: float = Field(0.5, ge=0)
    """Margin of the rarest class, a cosine."""
    scale: float = Field(20.0, gt=0)
    """Logits a cosine is worth: the temperature of a normalised classifier."""


class LogitAdjustmentRecipe(ClassifierRecipe):
    """`tailseg.losses.LogitAdjustmentClassification`."""

    loss: Literal["logit-adjustment"] = "logit-adjustment"
    tau: float = Field(1.0, ge=0)
    """Strength; 1 is balanced softmax."""


class FocalRecipe(ClassifierRecipe):
    """`tailseg.losses.FocalClassification`."""

    loss: Literal["focal"] = "focal"
    gamma: float = Field(2.0, ge=0)
    """Focusing exponent."""
    alpha: float = Field(0.25, ge=0, le=1)
    """Weight of positives; negatives have 1 - alpha."""


AnyClassifier = (
    CrossEntropyRecipe
    | SeesawRecipe
    | EqlRecipe
    | EqlV2Recipe
    | GroupSoftmaxRecipe
    | FederatedRecipe
    | ClassBalancedRecipe
    | LdamRecipe
    | LogitAdjustmentRecipe
    | FocalRecipe
)
CLASSIFIERS: dict[str, type[ClassifierRecipe]] = {
    kind.model_fields["loss"].default: kind for kind in get_args(AnyClassifier)
}
