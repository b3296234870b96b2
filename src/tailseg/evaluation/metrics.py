"""Average precision under the LVIS rules, as the official lvis-api computes it; matching runs in hotcoco.

The rules (those of lvis-api 0.5.3): the best 300 detections of an image over all classes count; a detection
of a class that nobody looked for in its image is left out; an unmatched one of a class that was not annotated
exhaustively there is ignored; AP is the mean over IoU 0.50:0.05:0.95, 101 recall points and the classes with
ground truth. Ties in score keep the order of the file.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hotcoco import COCO, COCOeval
from numpy.typing import NDArray
from rich.table import Table

from tailseg.data.annotations.annotations import Annotations, load_annotations, summary
from tailseg.errors import UserError
from tailseg.evaluation.analysis import analyse
from tailseg.evaluation.boundary import boundary_curves
from tailseg.evaluation.ground_truth import GroundTruth, ground_truth_of
from tailseg.evaluation.reading import Cut, ResultColumns, read_results
from tailseg.evaluation.thresholds import thresholds_content
from tailseg.files import write_whole
from tailseg.wording import short

logger = logging.getLogger(__name__)

Metrics = dict[str, dict[str, float | None]]
CLASSES_AT_ONCE = 2048  # of which precision and recall are worked out
MOST_DETECTIONS = 1_000_000_000  # of an image that may count
FIXED_AP_DETECTIONS = 10_000  # of each class over the whole set, by Dave et al., 2021


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreOptions:
    """Options of scoring: the metrics, and the detections that count."""

    max_dets: int = 300  # the best of each image that count
    fixed_ap: bool = False  # instead, the best 10,000 of each class over all images (Dave et al., 2021)
    boundary: bool = False  # add "boundary", AP by the smaller of mask IoU and boundary IoU
    analyse: bool = False  # add what lies behind the AP: see `tailseg.evaluation.analysis`

    def __post_init__(self) -> None:
        if type(self.max_dets) is not int or not 1 <= self.max_dets <= MOST_DETECTIONS:
            most = f"{MOST_DETECTIONS:,}"
            raise UserError(f"max_dets is {short(self.max_dets)}, expected a whole number from 1 to {most}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Metrics of one results file, fractions in [0, 1]; None where the data has nothing to measure it on."""

    metrics: Metrics  # "bbox" and "segm" -> AP, AP50, AP75, APs/m/l, APr/c/f, AR300, ARs/m/l300
    per_category: list[dict[str, Any]]  # id, name, frequency, train_images, instances, bbox_AP, segm_AP; by id
    analysis: dict[str, Any] | None = None  # by IoU type, if asked for: see `tailseg.evaluation.analysis`

    @property
    def thresholds(self) -> dict[str, Any] | None:
        """Scores from which on to show detections, of masks if there are any: see `thresholds_content`."""
        if self.analysis is None:
            return None
        found = self.analysis.get("segm") or self.analysis["bbox"]
        return thresholds_content(found["classes"], found["threshold"])


DEFAULT = ScoreOptions()
ANALYSIS = ("analysis.json", "thresholds.json", "analysis.html")  # files of an analysis; the jobs write the page


def score(
    annotations: Path | Annotations,
    detections: Path | list[dict[str, Any]],
    *,
    iou_types: Sequence[str] = ("bbox", "segm"),
    options: ScoreOptions = DEFAULT,
    frequencies: Mapping[int, str] | None = None,
    train_images: Mapping[int, int] | None = None,
    mask_areas: bool = False,
) -> Scores:
    """Score an LVIS results file.

    Two habits of lvis-api are kept: a detection's area is that of its box, for masks too, if the first row
    has a box; and detections of area 0 are dropped after the cut at ``options.max_dets``. An image without
    ``neg_category_ids``, as in COCO files, counts as searched for every class. Crowd regions are ignored.

    Args:
        annotations: LVIS or COCO annotation file (``.json`` or ``.json.gz``), or one that was read.
        detections: LVIS results file (``.json`` or ``.json.gz``), or its rows.
        iou_types: "bbox", "segm", or both.
        options: what is measured, and on which detections.
        frequencies: "r", "c" or "f" of every category id; by default what the annotation file says.
        train_images: images of the training set that have the class, of every category id; by default what the
            annotation file says.
        mask_areas: decide small, medium and large of "segm" by the masks' areas, though rows have boxes.

    Raises:
        UserError: a file is missing or damaged, or names ids that the annotation file does not have.
    """
    unknown = set(iou_types) - {"bbox", "segm"}
    if unknown or not iou_types:
        raise UserError(f"IoU types are bbox and segm, found {', '.join(sorted(unknown)) or 'none'}")
    if options.boundary and "segm" not in iou_types:
        raise UserError("boundary AP is of masks; add segm to the IoU types")
    with_masks = "segm" in iou_types
    if isinstance(annotations, Path):
        annotations = load_annotations(annotations, annotations.parent, masks=with_masks)
        if any(oddity.about.severity == "warning" for oddity in annotations.report.oddities):
            logger.warning(summary(annotations))
    truth = ground_truth_of(annotations, with_masks, frequencies)
    source = str(detections) if isinstance(detections, Path) else "detections"
    cut = Cut(limit=FIXED_AP_DETECTIONS, per_class=True) if options.fixed_ap else Cut(limit=options.max_dets)
    columns = read_results(detections, source, truth.known, iou_types, cut)
    labels = truth.objects.labels()
    frequencies_of = [truth.categories[label]["frequency"] for label in labels.tolist()]
    groups = {name: np.array([own == name for own in frequencies_of], bool) for name in "rcf"}
    suffix = "" if options.fixed_ap else str(options.max_dets)
    metrics: Metrics = {}
    analysis: dict[str, Any] = {}
    per_category = [
        category | {"train_images": (train_images or {}).get(category["id"], category["train_images"])}
        for category in truth.categories
    ]
    dataset = truth.dataset(columns.images, columns.categories)
    for iou_type in iou_types:
        own = columns.ranked(iou_type, cut)
        areas = detection_areas(own, use_masks=iou_type == "segm" and mask_areas)
        own, areas = own[areas > 0], areas[areas > 0]
        evaluation = match_detections(truth, dataset, own, areas, iou_type, cut.limit)
        precision, recall = curves_of(evaluation, labels)
        metrics[iou_type] = summarise(precision, recall, groups, suffix)
        for row in per_category:
            row[f"{iou_type}_AP"] = None
        for index, label in enumerate(labels.tolist()):
            per_category[label][f"{iou_type}_AP"] = mean_measured(precision[:, :, index, 0])
        if options.analyse:
            analysis[iou_type] = analyse(*(evaluation, per_category, iou_type, own, truth, annotations, precision))
        del evaluation, precision, recall  # not to stand beside those of the next kind
    if options.boundary:
        own = columns.ranked("segm", cut)
        precision, recall = boundary_curves(truth, own, detection_areas(own, use_masks=mask_areas))
        metrics["boundary"] = summarise(precision, recall, groups, suffix)
    return Scores(metrics=metrics, per_category=per_category, analysis=analysis or None)


def format_table(metrics: Metrics) -> Table:
    """The metrics in percent, one a row; a dash where there is nothing to measure."""
    table = Table(
        "%", *({"bbox": "boxes", "segm": "masks", "boundary": "outlines"}.get(kind, kind) for kind in metrics)
    )
    for name in next(iter(metrics.values()), {}):
        values = (of_kind[name] for of_kind in metrics.values())
        table.add_row(name, *("–" if value is None else f"{100 * value:.1f}" for value in values))
    return table


def detection_areas(columns: ResultColumns, *, use_masks: bool) -> NDArray[np.float64]:
    """(N,) what decides small, medium and large: the boxes' areas if there are boxes, unless masks are asked for."""
    if use_masks or columns.boxes is None:
        assert columns.mask_areas is not None
        return columns.mask_areas
    return columns.boxes[:, 2] * columns.boxes[:, 3]


def match_detections(
    truth: GroundTruth, dataset: COCO, columns: ResultColumns, areas: NDArray[np.float64], iou_type: str, limit: int
) -> COCOeval:
    """Match detections to ground truth; the arguments are those of `evaluator_of`."""
    evaluation = evaluator_of(truth, dataset, columns, areas, iou_type, limit)
    evaluation.evaluate()
    return evaluation


def evaluator_of(
    truth: GroundTruth, dataset: COCO, columns: ResultColumns, areas: NDArray[np.float64], iou_type: str, limit: int
) -> COCOeval:
    """Make detections ready to be matched.

    Args:
        truth: the objects.
        dataset: of ``truth``, for these detections and maybe more.
        columns: the detections that count.
        areas: (N,) pixels, of each; of those above 0, detection i has the id i + 1.
        iou_type: "bbox" or "segm".
        limit: detections of an image, or of a class, that count.
    """
    kept = areas > 0
    columns, areas = columns[kept], areas[kept]
    boxes = np.zeros((len(columns), 4)) if columns.boxes is None else columns.boxes
    table = np.column_stack([columns.images + 1, boxes, columns.scores, columns.categories + 1])
    masks = truth.known.codes(columns) if iou_type == "segm" else None
    found = dataset.load_res(table, segmentation=masks)
    del table, masks
    found.update_anns(ids=np.arange(1, len(columns) + 1), area=areas)
    # The best were picked before; the evaluator would cut at 300 itself, unless both of these tell it not to.
    found = found.cap_detections_per_image(None)
    evaluation = COCOeval(dataset, found, iou_type, lvis_style=True)
    evaluation.params.max_dets = [limit]
    return evaluation


def curves_of(evaluation: COCOeval, labels: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Precision (T, R, K, A) and recall (T, K, A) of matched detections; -1 where a class has no ground truth.

    T are 10 IoU thresholds, R 101 recall points, K the classes ``labels``, A 4 ranges of area (all, small, medium,
    large). hotcoco holds such arrays four times over, so many classes are taken in turn.
    """
    whole, classes = list(evaluation.params.cat_ids), (labels + 1).tolist()
    precision, recall = np.empty((10, 101, 0, 4)), np.empty((10, 0, 4))
    for first in range(0, len(classes), CLASSES_AT_ONCE):
        evaluation.params.cat_ids = classes[first : first + CLASSES_AT_ONCE]
        evaluation.accumulate()
        curves = evaluation.eval
        assert curves is not None
        part = curves["precision"][..., 0], curves["recall"][..., 0]
        del curves
        if first == 0:
            thresholds, recalls, _, areas = part[0].shape
            precision = np.empty((thresholds, recalls, len(classes), areas))
            recall = np.empty((thresholds, len(classes), areas))
        rows = slice(first, first + CLASSES_AT_ONCE)
        precision[:, :, rows], recall[:, rows] = part
    evaluation.params.cat_ids = whole
    return precision, recall


def summarise(
    precision: NDArray[np.float64],
    recall: NDArray[np.float64],
    groups: dict[str, NDArray[np.bool_]],
    suffix: str,
) -> dict[str, float | None]:
    """The thirteen numbers of lvis-api from precision (T, R, K, A) and recall (T, K, A)."""
    sizes = {"": 0, "s": 1, "m": 2, "l": 3}
    ap = {f"AP{size}": mean_measured(precision[..., area]) for size, area in sizes.items()}
    ap |= {"AP50": mean_measured(precision[0, ..., 0]), "AP75": mean_measured(precision[5, ..., 0])}
    ap |= {f"AP{name}": mean_measured(precision[:, :, members, 0]) for name, members in groups.items()}
    order = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")
    ar = {f"AR{size}{suffix}": mean_measured(recall[..., area]) for size, area in sizes.items()}
    return {name: ap[name] for name in order} | ar


def mean_measured(values: NDArray[np.float64]) -> float | None:
    """Mean of what was measured (-1 is not); None if nothing was."""
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else None


def write_scores(scores: Scores, metrics: Path, beside: str = "") -> None:
    """Write the metrics and beside them ``classes.csv`` and, if there is an analysis, its JSON and thresholds.

    Without one, that of earlier scores is removed.

    Args:
        scores: of one results file.
        metrics: JSON file.
        beside: what the names of the other files begin with.
    """
    classes = metrics.with_name(f"{beside}classes.csv")
    write_json(metrics, scores.metrics)
    text = io.StringIO()
    table = csv.DictWriter(text, list(scores.per_category[0]) if scores.per_category else [])
    table.writeheader()
    table.writerows(scores.per_category)
    write_whole(classes, text.getvalue())
    if scores.analysis is None:
        _remove(metrics, beside, ANALYSIS)
    else:
        write_json(metrics.with_name(f"{beside}analysis.json"), scores.analysis)
        write_json(metrics.with_name(f"{beside}thresholds.json"), scores.thresholds)


def remove_scores(metrics: Path, beside: str = "") -> None:
    """Remove the files of earlier scores, where there are none now; arguments of `write_scores`."""
    metrics.unlink(missing_ok=True)
    _remove(metrics, beside, ("classes.csv", *ANALYSIS))


def _remove(metrics: Path, beside: str, names: Sequence[str]) -> None:
    for name in names:
        metrics.with_name(f"{beside}{name}").unlink(missing_ok=True)


def read_classes(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``classes.csv`` of `write_scores`; none where it is missing or damaged."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [{name: _cell(name, text) for name, text in row.items()} for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError, AttributeError, csv.Error):
        return []


def _cell(column: str, text: str) -> Any:
    if column == "name":
        return text
    if not text:
        return None
    return text if column == "frequency" else float(text) if column.endswith("_AP") else int(text)


def checked_place(metrics: Path) -> Path:
    """The path of a file for metrics (UserError if none can be there, so that it is told before scoring)."""
    if metrics.is_dir():
        raise UserError(f"{metrics}: is a folder; name a file for the metrics, such as {metrics / 'metrics.json'}")
    if not metrics.parent.is_dir():
        raise UserError(f"{metrics}: No such file or directory; make its folder, or name another")
    return metrics


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON."""
    write_whole(path, json.dumps(content, indent=1) + "\n")
