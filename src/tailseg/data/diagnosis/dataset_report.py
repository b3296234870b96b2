"""Report on a data set before training: facts, and findings with a severity and a fix."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailseg.data.annotations.annotations import Annotations
from tailseg.data.annotations.frequency import GROUPS
from tailseg.data.dataset import trained_images
from tailseg.data.diagnosis.findings import TINY, Finding, Split, all_findings, by_severity
from tailseg.data.diagnosis.image_checks import look_at_files, steps
from tailseg.data.diagnosis.mask_checks import check_masks, image_of_rows
from tailseg.data.sampling import repeat_factors
from tailseg.data.sources import DataSplits
from tailseg.recipes.schema import Recipe


@dataclass(frozen=True, slots=True, eq=False)
class ClassRow:
    """One class: its counts, and how often sampling by repeat factors would see its images."""

    id: int
    name: str
    frequency: str
    train_images: int
    train_instances: int
    val_images: int
    repeat_factor: float


@dataclass(frozen=True, kw_only=True, eq=False)
class DatasetReport:
    """Everything that `tailseg data check` found."""

    data: str
    recipe: str
    splits: dict[str, dict[str, int]]  # counts of images, annotations, ... by split
    groups: dict[str, dict[str, int]]  # rare, common, frequent -> classes, train and val annotations
    classes: tuple[ClassRow, ...]  # most training images first
    scale: dict[str, float]  # sizes of objects at the recipe's resolution
    sampling: dict[str, float]  # repeat factors and epochs
    memory: dict[str, int]  # bytes
    suggestion: dict[str, str]  # recipe, reason, command
    findings: tuple[Finding, ...]  # errors first

    def usable(self) -> bool:
        """Return whether training can begin."""
        return all(finding.severity != "error" for finding in self.findings)

    def with_findings(self, more: Iterable[Finding]) -> DatasetReport:
        """The same report with more findings, those that count nothing left out."""
        return replace(self, findings=by_severity([*self.findings, *more]))

    def as_json(self) -> dict[str, Any]:
        """Everything, for a JSON file."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        plain["classes"] = [asdict(row) for row in self.classes]
        plain["findings"] = [asdict(finding) for finding in self.findings]
        return {"usable": self.usable(), **plain}


def file_steps(splits: DataSplits) -> int:
    """About how often `check_data` advances."""
    return sum(steps(part) for part in (splits.train, splits.val) if part is not None)


def check_data(
    data: str, splits: DataSplits, recipe: Recipe, advance: Callable[[int], None] = lambda done: None
) -> DatasetReport:
    """Examine a data set with both splits against a recipe.

    Args:
        data: what the user gave, for the suggested command.
        splits: annotation files that could be read; their images may be missing.
        recipe: whose resolution, sampling and batch count.
        advance: called with the number of images looked at.
    """
    train, val = splits.train, splits.val
    assert train is not None
    assert val is not None
    looked: list[Split] = []
    for name, part in (("train", train), ("val", val)):
        before = sum(steps(split.annotations) for split in looked)
        files = look_at_files(part, lambda done, before=before: advance(before + done))  # type: ignore[misc]
        looked.append(Split(name, part, files, check_masks(part)))
    scale = object_sizes(train, recipe)
    return DatasetReport(
        data=data,
        recipe=recipe.name,
        splits={split.name: _counts(split.annotations) for split in looked},
        groups=_groups(train, val),
        classes=_classes(train, val, recipe.data.repeat_threshold),
        scale=scale,
        sampling=_sampling(train, recipe),
        memory=expected_memory(splits, recipe),
        suggestion=suggest(data, train),
        findings=all_findings(looked, scale, tiny_classes(train, recipe)),
    )


# ---------------------------------------------------------------------------------------------------------
# Numbers


def _counts(part: Annotations) -> dict[str, int]:
    used = sum(category.image_count > 0 for category in part.categories)
    return {
        "images": len(part),
        "images_without_objects": part.report.empty_images,
        "annotations": part.report.annotations,
        "annotations_dropped": part.report.dropped,
        "crowds": part.report.crowd,
        "categories": len(part.categories),
        "categories_with_objects": used,
    }


def _groups(train: Annotations, val: Annotations) -> dict[str, dict[str, int]]:
    pairs = list(zip(train.categories, val.categories, strict=True))
    return {
        name: {
            "classes": sum(t.frequency == key for t, _ in pairs),
            "train_annotations": sum(t.instance_count for t, _ in pairs if t.frequency == key),
            "val_annotations": sum(v.instance_count for t, v in pairs if t.frequency == key),
        }
        for key, name in GROUPS.items()
    }


def _classes(train: Annotations, val: Annotations, threshold: float) -> tuple[ClassRow, ...]:
    share = train.image_counts() / max(len(trained_images(train)), 1)
    factors = np.sqrt(threshold / np.where(share > 0, share, np.inf)).clip(min=1)
    rows = [
        ClassRow(t.id, t.name, t.frequency, t.image_count, t.instance_count, v.image_count, round(float(r), 3))
        for t, v, r in zip(train.categories, val.categories, factors, strict=True)
    ]
    return tuple(sorted(rows, key=lambda row: (-row.train_images, row.id)))


def object_sides(train: Annotations, short: int, long: int) -> NDArray[np.float64]:
    """Sides (pixels) of the objects, the root of the box's area, in images fitted into ``short`` by ``long``."""
    hws = train.image_sizes
    factor = np.minimum(long / hws.max(axis=1), short / hws.min(axis=1))[image_of_rows(train)]
    sides = np.sqrt(np.prod(train.boxes[:, 2:] - train.boxes[:, :2], axis=1, dtype=np.float64)) * factor
    return np.asarray(sides[np.asarray(train.trained)])


def object_sizes(train: Annotations, recipe: Recipe) -> dict[str, float]:
    """Sides of the training objects as evaluation resizes the images (pixels), and shares under some of them."""
    short, long = recipe.data.test_short_edge, recipe.data.long_edge
    sides = object_sides(train, short, long)
    found = {"short_edge": float(short), "long_edge": float(long)}
    found["median_side"] = float(np.median(sides)) if len(sides) else 0.0
    for side in TINY:
        found[f"under_{side}"] = float((sides < side).mean()) if len(sides) else 0.0
    return found


def tiny_classes(train: Annotations, recipe: Recipe) -> list[str]:
    """Classes whose training objects have a median side under the smallest of `TINY`, with it; the smallest first."""
    sides = object_sides(train, recipe.data.test_short_edge, recipe.data.long_edge)
    labels = np.asarray(train.labels)[np.asarray(train.trained)]
    order = np.lexsort((sides, labels))
    medians = {
        train.categories[int(labels[own[0]])].name: float(np.median(sides[own]))
        for own in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
        if len(own)
    }
    smallest = sorted(medians.items(), key=lambda item: item[1])
    return [f"{name} (median {side:.1f})" for name, side in smallest if side < TINY[0]]


def _sampling(train: Annotations, recipe: Recipe) -> dict[str, float]:
    kept = trained_images(train)
    factors = repeat_factors(train, recipe.data.repeat_threshold, kept)
    ceiling = int(np.ceil(factors).sum())
    return {
        "threshold": recipe.data.repeat_threshold,
        "images": len(kept),
        "largest_factor": float(factors.max(initial=1)),
        "repeated_images": int((factors > 1).sum()),
        "epoch_ceil": ceiling,
        "epoch_stochastic": float(factors.sum()),
        "batch": recipe.optimizer.reference_batch,
        "steps_an_epoch": -(-len(kept) // recipe.optimizer.reference_batch),
        "steps_an_epoch_repeated": -(-ceiling // recipe.optimizer.reference_batch),
    }


def expected_memory(splits: DataSplits, recipe: Recipe) -> dict[str, int]:
    """Bytes. The columns of both annotation files as they lie in memory; and a training batch of the largest size:
    images as bytes and as float32 at (largest short edge x long edge), rounded up to 32 pixels, and masks of as many
    objects as the fullest image has. The network's own activations are not in it.
    """
    parts = [part for part in (splits.train, splits.val) if part is not None]
    most = max(int(np.diff(part.first_annotation).max(initial=0)) for part in parts)
    height, width = (-(-side // 32) * 32 for side in (max(recipe.data.short_edges), recipe.data.long_edge))
    image = 3 * height * width * (1 + 4)
    masks = most * (recipe.data.mask_grid + 2) ** 2
    return {
        "annotations": sum(map(_array_bytes, parts)),
        "batch": recipe.data.batch * (image + masks),
        "objects_of_the_fullest_image": most,
    }


def _array_bytes(value: object) -> int:
    """Bytes of the arrays in a record and in the records that it holds."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    return sum(_array_bytes(getattr(value, f.name)) for f in fields(value)) if is_dataclass(value) else 0


def suggest(data: str, train: Annotations) -> dict[str, str]:
    """A recipe by three questions: how large are the images, is there a GPU, is there a tail."""
    import torch

    counts = train.image_counts()
    counts = counts[counts > 0]
    tail = bool(len(counts)) and counts.max() >= 10 * counts.min()
    loss = "seesaw" if tail else "cross-entropy"
    if not len(train) or np.median(train.image_sizes.min(axis=1)) <= 160:
        table, why = "demo", "images of at most 160 pixels"
    elif torch.cuda.is_available():
        table, why = "own", "a GPU; own/accurate takes longer"
    else:
        table, why = "small", "no GPU here"
    tailed = "the most frequent class has at least 10 times the images of the rarest" if tail else "the classes balance"
    # Among classes of one frequency Seesaw Loss has nothing to mitigate, so own/* have it alone.
    name, start = ("own/fast", " --init coco") if table == "own" else (f"{table}/{loss}", "")
    return {
        "recipe": name,
        "reason": f"{why}; {tailed}",
        "command": f"tailseg train {name}{start} --data {shlex.quote(data)} --out runs/{name.rpartition('/')[2]}",
    }
