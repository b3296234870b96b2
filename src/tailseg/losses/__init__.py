"""The losses: one file each; usable with any model."""

from tailseg.losses.classification import (
    Classification,
    CrossEntropyClassification,
    SeesawClassification,
)
from tailseg.losses.seesaw import SeesawLoss

__all__ = ["Classification", "CrossEntropyClassification", "SeesawClassification", "SeesawLoss"]
