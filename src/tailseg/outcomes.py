"""Results of the jobs: what `train`, `evaluate` and `compare` return."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tailseg.evaluation.metrics import Metrics


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """A training run that is complete: its scores and where its files are.

    ``load(trained.model)`` gives the model.
    """

    out: Path  # the run's folder
    last: Path  # the model after the last step
    best: Path | None  # the model with the best segm AP; None if nothing could be scored
    metrics: Metrics | None  # "bbox" and "segm" -> AP, APr ... of the last evaluation, fractions in [0, 1]
    classes: list[dict[str, Any]] | None = field(repr=False)  # a row a class: id, name, frequency, segm_AP ...

    @property
    def model(self) -> Path:
        """The best model, or the last one if nothing could be scored."""
        return self.best or self.last


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    """The scores of a model on a split, and the files that were written."""

    metrics: Metrics  # "bbox" and "segm" -> AP, APr ..., fractions in [0, 1]; empty if there was nothing to score
    classes: list[dict[str, Any]] = field(repr=False)  # a row a class: id, name, frequency, train_images, segm_AP ...
    analysis: dict[str, Any] | None = field(repr=False)  # by IoU type, if asked for
    files: tuple[Path, ...]  # metrics.json, if asked for analysis.html and thresholds.json; detections.json

    @property
    def page(self) -> Path | None:
        """The page of the analysis, if there is one."""
        return next((file for file in self.files if file.name == "analysis.html"), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """Runs compared on the same images, and the files that were written."""

    content: dict[str, Any] = field(repr=False)  # what comparison.json holds, see `evaluation.paired.compare_runs`
    files: tuple[Path, ...]  # comparison.json and comparison.html
