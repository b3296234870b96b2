"""Annotation files (LVIS v1, LVIS v0.5, COCO) as flat columns.

A file becomes a handful of numpy arrays, those of a large file mapped from the cache (`cache.py`): no Python object
per annotation, so that all processes share the memory.
The instance filter (`filtering.py`) follows MMDetection's ``datasets/coco.py``; `frequency.py` makes the groups of
the LVIS paper.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailseg.data.annotations.cache import mapped_columns, stored_columns
from tailseg.data.annotations.columns import IdLists, Segmentations, Texts, positions_of
from tailseg.data.annotations.filtering import Report
from tailseg.data.annotations.image_files import ImageFolder, candidate_names
from tailseg.data.annotations.masks import Segmentation
from tailseg.data.annotations.oddities import counted
from tailseg.data.annotations.parsing import Category as Category
from tailseg.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Annotations:
    """An annotation file: images in the file's order, annotations sorted by image, labels by category id."""

    path: Path  # as it was given, for messages
    folder: Path  # of the file, absolute: the same wherever the program goes, as is the next
    images_dir: Path
    categories: tuple[Category, ...]  # in id order: the label is the position
    frequency_stated: bool  # the file itself gives each category's frequency
    report: Report

    image_ids: NDArray[np.int64]  # (I,) those from 2^63 on are negative here: `image_id` has the file's number
    image_sizes: NDArray[np.int64]  # (I, 2)
    file_names: Texts
    coco_urls: Texts
    stated_image_counts: NDArray[np.int64]  # (C,) each category's image_count in the file, -1 where it has none
    neg_category_ids: IdLists  # verified absent
    neg_stated: NDArray[np.bool_]  # (I,) the image has such a list, which may be empty
    not_exhaustive_category_ids: IdLists

    first_annotation: NDArray[np.int64]  # (I + 1,): image i has rows first[i] to first[i + 1]
    annotation_ids: NDArray[np.int64]  # (N,)
    labels: NDArray[np.int64]  # (N,) in [0, C)
    boxes: NDArray[np.float32]  # (N, 4) xyxy in pixels, as annotated: may reach beyond the image
    boxes_xywh: NDArray[np.float64]  # (N, 4) the same to the last digit, as scoring needs them
    areas: NDArray[np.float64]  # (N,) pixels; of the mask, where the file states none
    crowd: NDArray[np.bool_]  # (N,) a region of several objects: ignored in evaluation
    ignored: NDArray[np.bool_]  # (N,) "ignore" in LVIS's sense: found or not, it does not count
    trained: NDArray[np.bool_]  # (N,) neither a crowd nor ignored nor thinner than a pixel
    segmentations: Segmentations

    cache: Path | None = None  # the file that the columns are mapped from

    def __reduce__(self) -> Any:
        """Pickled for another process, mapped columns are a path."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.cache is not None:
            values = {name: value for name, value in values.items() if name not in _COLUMNS}
        return _restored, (values,)

    def __len__(self) -> int:
        """The number of images."""
        return len(self.image_ids)

    @cached_property
    def unsigned_ids(self) -> bool:
        """Image ids are meant without sign: some need all of 64 bits."""
        return any(oddity.kind == "unsigned_id" for oddity in self.report.oddities)

    def image_id(self, image: int) -> int:
        """The id of the ``image``-th image, as the file has it."""
        return self.stated_id(int(self.image_ids[image]))

    def stated_id(self, image_id: int) -> int:
        """An id of ``image_ids`` as the file has it."""
        return image_id % 2**64 if self.unsigned_ids else image_id

    @cached_property
    def label_to_category_id(self) -> NDArray[np.int64]:
        """(C,) the category id of each label: the one way back from labels to the file's ids."""
        return np.array([c.id for c in self.categories], dtype=np.int64)

    def category_id_to_label(self, category_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The labels of category ids of this file (ValueError for an id it has not)."""
        labels, known = positions_of(np.asarray(category_ids, np.int64), self.label_to_category_id)
        if not known.all():
            missing = np.asarray(category_ids)[~known][0]
            raise ValueError(f"expected category ids of {self.path}, received {missing}")
        return labels

    def image_counts(self) -> NDArray[np.int64]:
        """(C,) images that contain each class, after the instance filter."""
        return np.array([c.image_count for c in self.categories], dtype=np.int64)

    @cached_property
    def exhaustive(self) -> bool:
        """Images count as annotated exhaustively: no list in the file, as in COCO's, says what was looked for."""
        return not self.neg_category_ids.ids.size

    def absent(self, image: int) -> NDArray[np.bool_]:
        """(C,) the classes that the ``image``-th image was verified not to contain.

        In a file that is `exhaustive`, what is not there is absent.
        """
        absent = np.full(len(self.categories), self.exhaustive, np.bool_)
        if self.exhaustive:
            absent[self.labels[self.first_annotation[image] : self.first_annotation[image + 1]]] = False
        else:
            labels, known = positions_of(self.neg_category_ids[image], self.label_to_category_id)
            absent[labels[known]] = True
        return absent

    def rows(self, image: int) -> NDArray[np.int64]:
        """The annotations of the ``image``-th image that one trains on."""
        rows = np.arange(self.first_annotation[image], self.first_annotation[image + 1])
        return rows[self.trained[rows]]

    def ignored_rows(self, image: int) -> NDArray[np.int64]:
        """The annotations of the ``image``-th image whose place is neither object nor background: crowds, "ignore"."""
        rows = np.arange(self.first_annotation[image], self.first_annotation[image + 1])
        return rows[self.crowd[rows] | self.ignored[rows]]

    def image_of(self, row: int) -> int:
        """The position of the image that an annotation belongs to."""
        return int(np.searchsorted(self.first_annotation, row, side="right")) - 1

    def segmentation(self, row: int) -> Segmentation:
        """Polygons (float64, pixels) or compressed RLE of annotation ``row``."""
        return self.segmentations[row]

    @cached_property
    def _folder(self) -> ImageFolder:
        return ImageFolder(self.images_dir)

    def image_path(self, image: int) -> Path:
        """Path of the ``image``-th image.

        Raises:
            UserError: it has no name, is not in the image folder, or its name leads out of it.
        """
        names = candidate_names(self.file_names[image], self.coco_urls[image])
        where = f"{self.path}: image {self.image_id(image)}"
        if not names:
            raise UserError(f"{where}: it has no file_name and no coco_url; give one, to say which file it is")
        path = self._folder.find(names, where, self.folder)
        if path is None:
            place = f"{self.images_dir}, its train2017 or its val2017"
            raise UserError(f"{where}: {names[0]!r} is not in {place}; put it there or correct the image folder")
        return path

    def check_images(self) -> None:
        """Raise UserError unless the file of every image exists (it is not opened)."""
        if not self.images_dir.is_dir():
            raise UserError(f"{self.images_dir}: there is no such folder of images; put the images there")
        for image in range(len(self)):
            self.image_path(image)


def load_annotations(json_path: Path, images_dir: Path, *, masks: bool = True, tolerant: bool = False) -> Annotations:
    """Read an LVIS or COCO annotation file.

    A file that does not state the frequency of every category leaves all of them "f" until `frequency.with_groups`
    makes groups; ``frequency_stated`` tells the two apart.

    Args:
        json_path: the file.
        images_dir: folder of the images; looked at when an image is asked for, not before.
        masks: objects without a sound one are left out; False reads a file of boxes.
        tolerant: rows with errors are left out and counted in the report, as `tailseg data check` wants it.

    Raises:
        UserError: the file is missing, broken or contradicts itself.
    """
    stored = stored_columns(Path(json_path), masks=masks, tolerant=tolerant)
    return Annotations(
        path=Path(json_path),
        folder=Path(json_path).absolute().parent,
        images_dir=Path(images_dir).absolute(),
        categories=stored.categories,
        frequency_stated=stored.frequency_stated,
        report=stored.report,
        cache=stored.cache,
        **_typed(stored.columns),
    )


def _typed(columns: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """The columns of `Annotations`, by field."""
    typed: dict[str, Any] = {name: columns[name] for name in _PLAIN}
    for name, key in (("file_names", "file_name"), ("coco_urls", "coco_url")):
        typed[name] = Texts(columns[f"{key}_utf8"], columns[f"{key}_starts"])
    for name in ("neg_category_ids", "not_exhaustive_category_ids"):
        typed[name] = IdLists(columns[f"{name}_ids"], columns[f"{name}_starts"])
    typed["segmentations"] = Segmentations(*(columns[field.name] for field in fields(Segmentations)))
    return typed


_PLAIN = (
    *("image_ids", "image_sizes", "stated_image_counts", "neg_stated", "first_annotation", "annotation_ids", "labels"),
    *("boxes", "boxes_xywh", "areas", "crowd", "ignored", "trained"),
)
_COLUMNS = (
    *_PLAIN,
    *("file_names", "coco_urls", "neg_category_ids", "not_exhaustive_category_ids", "segmentations"),
)


def _restored(values: dict[str, Any]) -> Annotations:
    """Annotations from a pickle."""
    if values["cache"] is not None:
        values = values | _typed(mapped_columns(values["cache"]))
    return Annotations(**values)


def with_categories_of(val: Annotations, train: Annotations) -> Annotations:
    """``val`` with all categories of ``train``, if it lists some of them, under the same ids and names; else as it is.

    Tools that write each split by itself list the categories that occur in it.
    """
    known = {category.id: category for category in train.categories}
    own = {category.id: category for category in val.categories}
    if own.keys() == known.keys() or not all(i in known and known[i].name == own[i].name for i in own):
        return val
    stated = dict(zip(own, val.stated_image_counts.tolist(), strict=True))
    return replace(
        val,
        categories=tuple(
            own.get(i, replace(category, image_count=0, instance_count=0)) for i, category in known.items()
        ),
        frequency_stated=val.frequency_stated and train.frequency_stated,
        labels=positions_of(val.label_to_category_id[np.asarray(val.labels)], train.label_to_category_id)[0],
        stated_image_counts=np.array([stated.get(i, -1) for i in known], np.int64),
        cache=None,  # its labels are the old ones
    )


def require_same_categories(train: Annotations, val: Annotations) -> None:
    """Raise UserError unless both files have the same category ids and names."""
    ours = {c.id: c.name for c in train.categories}
    theirs = {c.id: c.name for c in val.categories}
    for category_id in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(category_id), theirs.get(category_id)
        if a != b:
            found = [f"{name!r}" if name is not None else "missing" for name in (a, b)]
            where = f"category {category_id} is {found[0]} in {train.path} but {found[1]} in {val.path}"
            raise UserError(
                f"{where}; both files need the same categories: `tailseg data convert coco` matches them by name"
            )


def tell(annotations: Annotations) -> None:
    """Log the summary, as a warning if objects were left out or may be wrong."""
    odd = any(oddity.about.severity == "warning" for oddity in annotations.report.oddities)
    logger.log(logging.WARNING if odd else logging.INFO, summary(annotations))


def summary(annotations: Annotations) -> str:
    """One line on what a file holds, what was left out of it and what was made good."""
    report = annotations.report
    text = f"{annotations.path}: {len(annotations)} images, {report.empty_images} of them without objects"
    text += f"; {report.annotations} annotations"
    if report.crowd:
        text += f", {report.crowd} of them crowds"
    if report.ignored:
        text += f", {report.ignored} to be ignored"
    if report.thin:
        text += f", {report.thin} narrower or lower than a pixel (scored, not trained on)"
    for oddity in report.oddities:
        text += "; " + counted(oddity.count, oddity.about.meaning, oddity.places)
    return text + "."
