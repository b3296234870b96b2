"""Runs compared on the same images, with paired bootstrap intervals of their differences.

All runs are scored on the same resampled sets of images, so what is hard or easy about a set cancels in a difference.
Shape letters: B resampled sets, I images, K classes.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailseg.data.annotations.annotations import Annotations, load_annotations, tell
from tailseg.data.sources import SYNTHETIC, DataSplits, open_data, open_splits
from tailseg.errors import UserError
from tailseg.evaluation.bootstrap import ObjectCounts, Weights, class_aps, resampled
from tailseg.evaluation.ground_truth import GroundTruth, ground_truth_of
from tailseg.evaluation.metrics import mean_measured
from tailseg.evaluation.ranked_matches import RankedMatches, ranked_matches
from tailseg.evaluation.reading import Cut, kinds_in, read_results
from tailseg.evaluation.run_files import RunFiles, find_runs

logger = logging.getLogger(__name__)

METRICS = ("AP", "AP50", "APr", "APc", "APf")
CONFIDENCE = 0.95
# Were all images with the class to favour one run by mere chance, it would happen twice in 2^n: at 95%, n is 6 or more.
FEWEST_IMAGES = 6
MANY_IMAGES = 5000  # up to which 1,000 sets are drawn: of more images 200, or it would take a quarter of an hour

Values = NDArray[np.float64]
Content = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Scored:
    """One run and one kind: what it reaches on the data, and on the resampled sets."""

    metrics: dict[str, float | None]
    classes: dict[int, float | None]  # AP of the classes with objects
    metric_sets: dict[str, Values]  # (B,) each; NaN where a set has nothing to measure
    class_sets: dict[int, Values]  # (B,) AP of the classes with objects that count


def compare(runs: Sequence[str | Path], truth: str | DataSplits | Path, split: str, *, show: bool = True) -> Content:
    """Find runs and images, and compare the runs: see `compare_runs`.

    Args:
        runs: as for `find_runs`.
        truth: what stands behind ``--data``, a set that is open, or (a path) an annotation file.
        split: "train" or "val", of data.
        show: draw a progress bar where data are drawn or imported.

    Raises:
        UserError: runs or data are missing, damaged or do not belong together.
    """
    if isinstance(truth, Path):
        files = find_runs(runs, truth.stem, split)
        kinds = common_kinds(files)
        annotations = load_annotations(truth, truth.parent, masks="segm" in kinds)
        tell(annotations)
        return compare_runs(annotations, files, kinds, truth.name)
    if not isinstance(truth, DataSplits):
        # Only the built-in set is not on the disk yet; of others the images need not be there.
        truth = open_data(truth, need=(split,), show=show) if truth == SYNTHETIC else open_splits(truth, need=(split,))
    opened = truth.val if split == "val" else truth.train
    if opened is None:
        raise UserError(f"{truth.name}: was opened without its split {split}; open it with need={[split]}")
    files = find_runs(runs, truth.name, split)
    tell(opened)
    frequencies = {category.id: category.frequency for category in opened.categories}
    return compare_runs(opened, files, common_kinds(files), f"{truth.name}, {split}", frequencies)


def compare_runs(
    annotations: Annotations,
    runs: Sequence[RunFiles],
    kinds: Sequence[str],
    data: str,
    frequencies: Mapping[int, str] | None = None,
) -> Content:
    """Score runs on the same images and compare each with the first, as JSON content.

    Metrics are those of `tailseg.evaluation.metrics.score`. Frequency groups are those of the first evaluation that
    states them (its classes.csv), else the data's.

    Args:
        annotations: the split that all runs were evaluated on.
        runs: two or more.
        kinds: "bbox", "segm" or both: those of `common_kinds`.
        data: name of the images, for messages and the report.
        frequencies: "r", "c" or "f" of every category id, where no evaluation states them; by default what the
            annotation file says.

    Returns:
        ``runs`` (name, detections), ``images``, ``sets``, ``confidence``, ``fewest_images``, and ``kinds``: for "bbox"
        and "segm" the rows of ``metrics`` and of ``classes`` (those with objects). A row has each run's value; and for
        each run but the first the difference to it: value, interval and ``beyond_chance``, both null where objects are
        in fewer images than can tell. All are fractions, null if there is nothing to measure.

    Raises:
        UserError: results are missing, damaged, or of other data.
    """
    if not len(annotations.labels):
        raise UserError(f"{annotations.path}: has no annotations, so there is nothing to compare")
    truth = ground_truth_of(annotations, "segm" in kinds, frequencies)
    stated = [groups for run in runs if (groups := run.groups(truth.categories)) is not None]
    if stated:
        _tell_groups(stated)
        for category in truth.categories:
            category["frequency"] = stated[0][category["id"]]
    images = len(truth.known.image_ids)
    weights = resampled(images, 1000 if images <= MANY_IMAGES else 200, seed=0)
    objects = ObjectCounts.of(truth)
    scored: dict[str, list[_Scored]] = {kind: [] for kind in kinds}
    for run in runs:
        logger.info("%s: scoring %s", run.name, run.detections)
        for kind, found in _score(run, truth, kinds, objects, weights, data).items():
            scored[kind].append(found)
    return {
        **{"data": data, "images": images, "sets": len(weights)},
        **{"confidence": CONFIDENCE, "fewest_images": FEWEST_IMAGES},
        "runs": [{"name": run.name, "detections": str(run.detections)} for run in runs],
        "kinds": {kind: _tables(of_kind, truth, objects) for kind, of_kind in scored.items()},
    }


def common_kinds(runs: Sequence[RunFiles]) -> list[str]:
    """Which of "bbox" and "segm" all runs have; what a run lacks is said.

    Raises:
        UserError: they have neither in common, or a file is missing or damaged.
    """
    there = {run.name: kinds_in(run.detections, str(run.detections)) for run in runs}
    common = [kind for kind in ("bbox", "segm") if all(kind in kinds for kinds in there.values())]
    if not common:
        found = ", ".join(f"{name} has {' and '.join(sorted(kinds)) or 'neither'}" for name, kinds in there.items())
        raise UserError(f"the runs have neither boxes nor masks in common: {found}; write them with both")
    for name, kinds in there.items():
        for kind, word in (("bbox", "boxes"), ("segm", "masks")):
            if kind not in kinds:
                logger.warning("%s has no %s, so %s are not compared.", name, word, word)
    return common


def _tell_groups(stated: Sequence[dict[int, str]]) -> None:
    differing = sum(any(groups[i] != stated[0][i] for groups in stated[1:]) for i in stated[0])
    if differing:
        logger.warning(
            "%d classes are in another frequency group in another run's evaluation; the first one's groups count.",
            differing,
        )


def _score(
    run: RunFiles, truth: GroundTruth, kinds: Sequence[str], objects: ObjectCounts, weights: Weights, data: str
) -> dict[str, _Scored]:
    cut = Cut()
    columns = read_results(run.detections, str(run.detections), truth.known, kinds, cut)
    dataset = truth.dataset(columns.images, columns.categories)
    labels, counted = truth.objects.labels(), objects.labels()
    scored = {}
    for kind in kinds:
        matches = ranked_matches(truth, dataset, columns.ranked(kind, cut), kind, cut.limit)
        if kind == "bbox":  # masks that are empty count for `tailseg score`, not for `eval`
            run.require_same_score(kind, mean_measured(matches.precision), data)
        ap, ap50 = class_aps(matches, objects, weights)
        sets = {"AP": _mean_there(ap), "AP50": _mean_there(ap50)}
        sets |= {f"AP{group}": _mean_there(ap[places]) for group, places in _members(truth, counted).items()}
        scored[kind] = _Scored(
            metrics=_metrics(matches, _members(truth, labels)),
            classes={label: mean_measured(matches.precision[:, :, i]) for i, label in enumerate(labels.tolist())},
            metric_sets=sets,
            class_sets=dict(zip(counted.tolist(), ap, strict=True)),
        )
    return scored


def _members(truth: GroundTruth, labels: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """The places among ``labels`` of those of each frequency group."""
    groups = np.array([truth.categories[label]["frequency"] or "" for label in labels.tolist()], np.str_)
    return {group: np.flatnonzero(groups == group) for group in "rcf"}


def _metrics(matches: RankedMatches, members: dict[str, NDArray[np.int64]]) -> dict[str, float | None]:
    precision = matches.precision
    metrics = {"AP": mean_measured(precision), "AP50": mean_measured(precision[0])}
    return metrics | {f"AP{group}": mean_measured(precision[:, :, labels]) for group, labels in members.items()}


def _mean_there(values: Values) -> Values:
    """(B,) means over the classes (K, B) that are there, NaN where none is."""
    there = ~np.isnan(values)
    count = there.sum(axis=0)
    total: Values = np.where(there, values, 0.0).sum(axis=0)
    means: Values = np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)
    return means


def _tables(runs: Sequence[_Scored], truth: GroundTruth, objects: ObjectCounts) -> Content:
    measured = objects.labels()
    of_metric = {f"AP{group}": measured[places] for group, places in _members(truth, measured).items()}
    image_counts = objects.image_counts().tolist()
    metrics = []
    for metric in METRICS:
        labels = of_metric.get(metric, measured)
        images = objects.images_with_any(labels)
        metrics.append(
            {
                **{"metric": metric, "classes": len(labels), "images": images},
                "runs": [run.metrics[metric] for run in runs],
                "differences": [
                    _difference(
                        *(runs[0].metrics[metric], run.metrics[metric]),
                        run.metric_sets[metric] - runs[0].metric_sets[metric],
                        images,
                    )
                    for run in runs[1:]
                ],
            }
        )
    classes = [
        {
            **category,
            "images": image_counts[label],
            "runs": [run.classes[label] for run in runs],
            "differences": [
                _difference(
                    *(runs[0].classes[label], run.classes[label]),
                    run.class_sets[label] - runs[0].class_sets[label],
                    image_counts[label],
                )
                for run in runs[1:]
            ],
        }
        for label, category in enumerate(truth.categories)
        if image_counts[label]
    ]
    return {"metrics": metrics, "classes": classes}


def _difference(first: float | None, other: float | None, sets: Values, images: int) -> Content:
    """The difference of a run to the first, with its interval, from the differences in the resampled sets (B,)."""
    # Of so few images sets hold the same one over and over: their interval would be much too narrow.
    interval = _interval(sets) if images >= FEWEST_IMAGES else None
    beyond = None if interval is None else interval[0] > 0 or interval[1] < 0
    value = None if first is None or other is None else other - first
    return {"value": value, "interval": interval, "beyond_chance": beyond}


def _interval(sets: Values) -> list[float] | None:
    """The percentile interval of values (B,), of which some may be NaN."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice")
        low, high = np.nanpercentile(sets, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)]).tolist()
    return None if np.isnan(low) else [low, high]
