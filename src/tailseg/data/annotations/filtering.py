"""The annotations of a file that are kept, and the report of what is left out (MMDetection's instance filter)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from hotcoco import mask as rle
from numpy.typing import NDArray

from tailseg.data.annotations.columns import Columns, Segmentations, positions_of, starts_of, take_rows
from tailseg.data.annotations.masks import pixels_covered
from tailseg.data.annotations.oddities import PLACES, Oddity, Tally
from tailseg.data.annotations.segmentations import Fault


@dataclass(frozen=True, slots=True)
class Report:
    """Counts of the file's content and of what was odd about it."""

    annotations: int  # in the file
    crowd: int  # iscrowd: kept in the columns, but out of training
    ignored: int  # "ignore" in LVIS's sense: kept, but out of training; found or not, it does not count
    thin: int  # box narrower or lower than one pixel: kept to be scored, as lvis-api does, but out of training
    empty_images: int  # images without an instance to train on
    oddities: tuple[Oddity, ...]

    @property
    def dropped(self) -> int:
        """Annotations that are in the file but not in the columns."""
        return sum(oddity.count for oddity in self.oddities if oddity.about.dropped)


def keep(
    annotations: Columns,
    images: Columns,
    category_ids: NDArray[np.int64],
    faults: dict[int, Fault],
    met: Tally,
    *,
    with_masks: bool,
) -> NDArray[np.int64]:
    """The annotations that are kept, sorted by image; each of the others is counted once.

    Args:
        annotations: gains the columns ``images``, positions, ``labels``, ``boxes`` and ``trained``; boxes and areas
            that the file does not state are filled in, and ``rle_hws`` goes.
        images: of the file.
        category_ids: (C,) in order.
        faults: of segmentations.
        met: where the others are counted.
        with_masks: an annotation without a sound mask is left out.
    """
    ids = annotations["annotation_ids"]
    repeated = _repeated(ids)
    met.add("annotation_id", (f"annotation {number}" for number in repeated[:PLACES]), len(repeated))
    left = np.ones(len(ids), np.bool_)

    def leave_out(kind: str, flags: NDArray[np.bool_], problem: Callable[[int], str] = lambda row: "") -> None:
        rows = np.flatnonzero(flags & left)
        met.add(kind, (f"annotation {ids[row]}{problem(row)}" for row in rows[:PLACES].tolist()), len(rows))
        left[rows] = False

    for name, key, of, known in (
        ("labels", "category_id", "category", category_ids),
        ("images", "image_id", "image", images["image_ids"]),
    ):
        wanted = annotations.pop(key)
        annotations[name], found = positions_of(wanted, known)
        leave_out(
            f"no_{of}",
            ~found,
            lambda row: f": there is no {of} with the {key} {wanted[row]}",  # noqa: B023
        )
    hws = images["image_sizes"][annotations["images"]] if len(images["image_sizes"]) else np.zeros((len(ids), 2))
    stated = annotations.pop("rle_hws")
    for row in np.flatnonzero(left & (stated > 0).all(axis=1) & (stated != hws).any(axis=1)).tolist():
        sizes = f"the RLE's size is {stated[row].tolist()} but the image's is {hws[row].tolist()}"
        faults.setdefault(row, Fault("bad_mask", sizes))
    for kind in ("no_mask", "bad_mask") if with_masks else ():
        at_fault = np.zeros(len(ids), np.bool_)
        at_fault[[row for row, fault in faults.items() if fault.kind == kind]] = True
        leave_out(kind, at_fault, lambda row: f": {faults[row].problem}")
    _fill_boxes(annotations, hws, left, faults, met)
    x, y, w, h = annotations["boxes_xywh"].T
    leave_out("no_box", np.isnan(x))
    _fill_areas(annotations, hws, left, faults if with_masks else None, met)
    leave_out("outside", ~_meet(annotations["boxes_xywh"], hws))
    leave_out("no_area", annotations["areas"] <= 0)
    annotations["boxes"] = np.stack([x, y, x + w, y + h], axis=1)
    annotations["trained"] = ~((w < 1) | (h < 1)) & ~annotations["crowd"] & ~annotations["ignored"]
    kept = np.flatnonzero(left)
    return kept[np.argsort(annotations["images"][kept], kind="stable")]


def _segmentations(annotations: Columns) -> Segmentations:
    """The segmentations of columns that still have lengths for starts."""
    return Segmentations(
        annotations["coordinates"],
        starts_of(annotations["polygon_lengths"]),
        starts_of(annotations["polygon_counts"]),
        annotations["rle_bytes"],
        starts_of(annotations["rle_lengths"]),
    )


def _fill_boxes(
    annotations: Columns, hws: NDArray[Any], left: NDArray[np.bool_], faults: dict[int, Fault], met: Tally
) -> None:
    """Boxes that the file does not state or that do not meet the image: those around the masks, where they do."""
    boxes, ids = annotations["boxes_xywh"], annotations["annotation_ids"]
    boxes[(boxes[:, 2:] < 0).any(axis=1)] = np.nan
    rows = [row for row in np.flatnonzero(left & ~_meet(boxes, hws)).tolist() if row not in faults]
    if not rows:
        return
    segmentations = _segmentations(annotations)
    stated = boxes[rows]
    for row in rows:
        segmentation = segmentations[row]
        if isinstance(segmentation, bytes):
            boxes[row] = rle.toBbox({"size": hws[row].tolist(), "counts": segmentation})
        else:
            points = np.concatenate(segmentation).reshape(-1, 2)
            low, high = points.min(axis=0), points.max(axis=0)
            boxes[row] = [*low, *(high - low)]
    beside = ~np.isnan(stated).any(axis=1) & ~_meet(boxes[rows], hws[rows])  # as the masks are
    boxes[np.array(rows)[beside]] = stated[beside]
    filled = np.array(rows)[~beside].tolist()
    met.add("box", (f"annotation {ids[row]}" for row in filled[:PLACES]), len(filled))


def _meet(boxes: NDArray[np.float64], hws: NDArray[Any]) -> NDArray[np.bool_]:
    """(N,) whether boxes (N, 4) xywh have an area in their image; where a number is missing they have none."""
    low, high = np.maximum(boxes[:, :2], 0), np.minimum(boxes[:, :2] + boxes[:, 2:], hws[:, ::-1])
    return np.asarray((high > low).all(axis=1))


def _fill_areas(
    annotations: Columns, hws: NDArray[Any], left: NDArray[np.bool_], faults: dict[int, Fault] | None, met: Tally
) -> None:
    """Areas that the file does not state, or below 0: those of the masks; of the boxes if ``faults`` is None."""
    areas, ids = annotations["areas"], annotations["annotation_ids"]
    areas[areas < 0] = np.nan
    rows = np.flatnonzero(left & np.isnan(areas))
    if not rows.size:
        return
    areas[rows] = annotations["boxes_xywh"][rows, 2:].prod(axis=1)
    segmentations = _segmentations(annotations)
    for row in rows.tolist() if faults is not None else ():
        height, width = hws[row].tolist()
        areas[row] = pixels_covered(segmentations[row], (height, width))
    met.add("area", (f"annotation {number}" for number in ids[rows[:PLACES]]), len(rows))


def in_order(annotations: Columns, kept: NDArray[np.int64]) -> Columns:
    """The kept annotations in their order, the flat columns with starts for lengths. ``annotations`` is used up."""
    names = ("annotation_ids", "labels", "images", "crowd", "ignored", "trained", "boxes_xywh", "areas")
    columns: Columns = {name: annotations.pop(name)[kept] for name in names}
    columns["boxes"] = annotations.pop("boxes")[kept].astype(np.float32)
    lengths, first_polygon = annotations.pop("polygon_lengths"), starts_of(annotations.pop("polygon_counts"))
    coordinate_starts = starts_of(lengths)[first_polygon]  # of each annotation
    columns["coordinates"] = take_rows(annotations.pop("coordinates"), coordinate_starts, kept)
    columns["polygon_starts"] = starts_of(take_rows(lengths, first_polygon, kept))
    columns["first_polygon"] = starts_of(np.diff(first_polygon)[kept])
    rle_starts = starts_of(annotations.pop("rle_lengths"))
    columns["rle_bytes"] = take_rows(annotations.pop("rle_bytes"), rle_starts, kept)
    columns["rle_starts"] = starts_of(np.diff(rle_starts)[kept])
    return columns


def add_repeated(met: Tally, kind: str, ids: NDArray[np.int64]) -> None:
    """Count the rows whose id an earlier row has."""
    repeated = _repeated(ids)
    places = (f"{kind} {number}: this id occurs more than once" for number in repeated[:PLACES])
    met.add(f"{kind}_id_again", places, len(repeated))


def _repeated(ids: NDArray[np.int64]) -> list[int]:
    """Ids that occur again, as often as they do."""
    in_order = np.sort(ids)
    repeated: list[int] = in_order[1:][in_order[1:] == in_order[:-1]].tolist()
    return repeated
