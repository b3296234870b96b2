"""The annotations of a file that are kept, and the report of what is left out (MMDetection's instance filter)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tailseg.data.annotations.columns import Columns, Segmentations, positions_of, starts_of, take_rows
from tailseg.data.annotations.masks import pixels_covered
from tailseg.errors import UserError


@dataclass(frozen=True, slots=True)
class Report:
    """Counts of the file's content and of what was left out; each annotation is counted once, in this order."""

    annotations: int  # in the file
    crowd: int  # iscrowd: kept in the columns, but out of training
    outside: int  # dropped: the box does not meet the image
    no_area: int  # dropped: area <= 0
    thin: int  # box narrower or lower than one pixel: kept to be scored, as lvis-api does, but out of training
    thin_dropped: int  # of these, dropped because their mask is at fault
    empty_images: int  # images without an instance to train on

    @property
    def dropped(self) -> int:
        """Annotations that are in the file but not in the columns."""
        return self.outside + self.no_area + self.thin_dropped


def keep(
    path: Path,
    annotations: Columns,
    images: Columns,
    category_ids: NDArray[np.int64],
    faults: dict[int, str],
    *,
    derive_areas_from_masks: bool,
) -> tuple[NDArray[np.int64], Report]:
    """The annotations that are kept, sorted by image; and what was left out.

    ``annotations`` gains the columns ``images``, positions, ``labels``, ``boxes`` and ``trained``; areas that the file
    does not state are filled in.
    """
    ids = annotations["annotation_ids"]
    require_unique(path, "annotation", ids)
    for name, key, of, known in (
        ("images", "image_id", "image", images["image_ids"]),
        ("labels", "category_id", "category", category_ids),
    ):
        wanted = annotations.pop(key)
        annotations[name], found = positions_of(wanted, known)
        if not found.all():
            bad = int(np.argmin(found))
            problem = f"there is no {of} with the {key} {wanted[bad]}; add it or remove this annotation"
            raise UserError(f"{path}: annotation {ids[bad]}: {problem}")
    x, y, w, h = annotations["boxes_xywh"].T
    _fill_areas(annotations, images, from_masks=derive_areas_from_masks)
    height, width = images["image_sizes"][annotations["images"]].T
    inter_w = np.minimum(x + w, width) - np.maximum(x, 0)
    inter_h = np.minimum(y + h, height) - np.maximum(y, 0)
    outside = (inter_w <= 0) | (inter_h <= 0)
    no_area = ~outside & (annotations["areas"] <= 0)
    thin = ~outside & ~no_area & ((w < 1) | (h < 1))
    annotations["boxes"] = np.stack([x, y, x + w, y + h], axis=1)
    annotations["trained"] = ~thin & ~annotations["crowd"]
    at_fault = np.zeros(len(ids), np.bool_)
    at_fault[list(faults)] = True
    dropped = outside | no_area | (thin & at_fault)

    kept = np.flatnonzero(~dropped)
    kept = kept[np.argsort(annotations["images"][kept], kind="stable")]
    trained = annotations["images"][kept][annotations["trained"][kept]]
    instances = np.bincount(trained, minlength=len(images["image_ids"]))
    report = Report(
        annotations=len(ids),
        crowd=int(annotations["crowd"][kept].sum()),
        outside=int(outside.sum()),
        no_area=int(no_area.sum()),
        thin=int(thin.sum()),
        thin_dropped=int((thin & at_fault).sum()),
        empty_images=int((instances == 0).sum()),
    )
    return kept, report


def _fill_areas(annotations: Columns, images: Columns, *, from_masks: bool) -> None:
    """Areas that the file does not state: those of the masks, or of the boxes where there is no mask."""
    rows = np.flatnonzero(np.isnan(annotations["areas"]))
    if not rows.size:
        return
    annotations["areas"][rows] = annotations["boxes_xywh"][rows, 2:].prod(axis=1)
    segmentations = Segmentations(
        annotations["coordinates"],
        starts_of(annotations["polygon_lengths"]),
        starts_of(annotations["polygon_counts"]),
        annotations["rle_bytes"],
        starts_of(annotations["rle_lengths"]),
    )
    for row in rows if from_masks else ():
        segmentation = segmentations[int(row)]
        if segmentation:
            height, width = images["image_sizes"][annotations["images"][row]].tolist()
            annotations["areas"][row] = pixels_covered(segmentation, (height, width))


def require_sound_segmentations(
    path: Path,
    annotations: Columns,
    images: Columns,
    kept: NDArray[np.int64],
    faults: dict[int, str],
    rle_hws: NDArray[np.int32],
) -> None:
    """Raise UserError where a kept annotation's segmentation is at fault or has not its image's size."""
    stated = rle_hws[kept]
    hws = images["image_sizes"][annotations["images"][kept]]
    wrong = np.flatnonzero((stated > 0).all(axis=1) & (stated != hws).any(axis=1))
    sizes = {
        int(kept[i]): f"the RLE's size is {stated[i].tolist()} but the image's is {hws[i].tolist()}; make them equal"
        for i in wrong[:1]
    }
    at_fault = kept[np.isin(kept, list(faults | sizes))]
    if len(at_fault):
        first = int(min(at_fault))
        problem = (faults | sizes)[first]
        raise UserError(f"{path}: annotation {annotations['annotation_ids'][first]}: {problem}")


def in_order(annotations: Columns, kept: NDArray[np.int64]) -> Columns:
    """The kept annotations in their order, the flat columns with starts for lengths. ``annotations`` is used up."""
    names = ("annotation_ids", "labels", "images", "crowd", "trained", "boxes_xywh", "areas")
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


def require_unique(path: Path, kind: str, ids: NDArray[np.int64]) -> None:
    """Raise UserError where an id occurs twice."""
    in_order = np.sort(ids)
    repeated = np.flatnonzero(in_order[1:] == in_order[:-1])
    if repeated.size:
        problem = "this id occurs more than once; give each its own"
        raise UserError(f"{path}: {kind} {in_order[repeated[0]]}: {problem}")
