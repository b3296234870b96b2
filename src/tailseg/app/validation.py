"""From a model and a data set to what the page shows of it: from saved results, or evaluated now."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from tailseg.app.browser import Browser
from tailseg.data.annotations.annotations import Annotations
from tailseg.data.annotations.frequency import GroupRule
from tailseg.errors import UserError
from tailseg.evaluation.findings import findings_of
from tailseg.evaluation.run_files import DETECTIONS, METRICS
from tailseg.evaluation.thresholds import FALLBACK
from tailseg.jobs import evaluate, open_data
from tailseg.predict import Model

logger = logging.getLogger(__name__)

ANALYSIS = "analysis.json"


def open_browser(model: Model, data: str, scratch: Path, *, show: bool = True) -> Browser:
    """The validation set of a data set as a model sees it.

    Results of ``tailseg eval MODEL --data DATA --analyse`` beside the model are taken if they are newer than the
    model and the annotations; otherwise the model is evaluated, which for a large set takes long.

    Args:
        model: it must come from a file.
        data: what stands behind ``--data``.
        scratch: folder for results that are made here.
        show: report progress.

    Raises:
        UserError: the data have no validation split, or one without annotations; or saved results are damaged.
    """
    splits = open_data(data, need=("val",), rule=GroupRule.of(model.recipe.data), show=show)
    annotations = splits.val
    assert annotations is not None
    if not len(annotations.labels):
        raise UserError(f"{annotations.path}: has no annotations to compare with; give a validation split that has")
    saved = (model.path or Path()).parent / f"eval-{splits.name}-val"
    if _usable(saved, model.path, annotations.path):
        logger.info("Validation set: results of %s.", saved)
        folder = saved
    else:
        logger.info(
            "Validation set: evaluating now; `tailseg eval %s --data %s --analyse` keeps the results for next time.",
            model.path,
            data,
        )
        folder = scratch
        evaluate(model, splits, folder, analyse=True, show=show)
    return read_browser(annotations, folder)


def read_browser(annotations: Annotations, folder: Path) -> Browser:
    """The same from the folder of an evaluation.

    Raises:
        UserError: its files are damaged or of other data.
    """
    analysis, metrics = _part(folder / ANALYSIS), _part(folder / METRICS)
    try:
        common = analysis["threshold"]
        common = analysis.get("mask_threshold") or common  # of the scores that rank masks, if they have their own
        threshold = FALLBACK if common is None else float(common["score"])
        findings = findings_of(annotations, folder / DETECTIONS, threshold)
        return Browser(annotations, findings, analysis, metrics)
    except (KeyError, TypeError) as error:
        raise _damaged(folder / ANALYSIS, error) from error


def _usable(folder: Path, model: Path | None, annotations: Path) -> bool:
    files = [folder / name for name in (DETECTIONS, METRICS, ANALYSIS)]
    if model is None or not all(file.is_file() for file in files):
        return False
    newest = max(path.stat().st_mtime for path in (model, annotations))
    return min(file.stat().st_mtime for file in files) >= newest


def _part(path: Path) -> Any:
    """The results of masks in a file of an evaluation."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["segm"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path}: is not what `tailseg eval --analyse` writes ({type(error).__name__}); evaluate again, or remove it"
    )
