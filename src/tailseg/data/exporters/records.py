"""Records that every export is written from: images with their objects, from annotations or from detections."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tailseg.data.annotations.annotations import Annotations, Category
from tailseg.data.annotations.masks import Segmentation
from tailseg.data.importers.foreign import LeftOut
from tailseg.errors import UserError

WITHOUT_MASK = "objects without a mask left out"


@dataclass(frozen=True, slots=True, eq=False)
class ExportObject:
    """One object."""

    label: int  # position among the categories
    box: tuple[float, float, float, float]  # x, y, width, height in pixels
    segmentation: Segmentation
    area: float  # pixels
    crowd: bool = False
    ignored: bool = False  # in LVIS's sense: found or not, it does not count
    score: float | None = None  # of a detection
    id: int | None = None  # of an annotation


@dataclass(frozen=True, slots=True, eq=False)
class ExportImage:
    """One image with its objects."""

    name: str  # path in its folder, parts joined by slashes
    path: Path  # its file
    image_hw: tuple[int, int]  # of the picture in which the objects were annotated or found
    objects: Sequence[ExportObject]
    id: int | None = None
    neg_category_ids: list[int] | None = None  # LVIS: verified absent; None where nothing is stated
    not_exhaustive_category_ids: list[int] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ExportSet:
    """A data set, or the images of a prediction."""

    where: str  # opens sentences about its categories
    categories: Sequence[Category]  # by label
    splits: Mapping[str, Iterable[ExportImage]]  # by name; a set without splits has one of the name ""
    frequencies: bool = False  # the categories' frequency groups are stated, not computed


def images_of(annotations: Annotations) -> Iterator[ExportImage]:
    """The images of an annotation file in its order, with all objects that the file's reader keeps.

    Raises:
        UserError: an image is not where the file says.
    """
    for i in range(len(annotations)):
        path = annotations.image_path(i)
        inside = path.is_relative_to(annotations.images_dir)
        stated = bool(annotations.neg_stated[i])
        height, width = annotations.image_sizes[i].tolist()
        first, stop = annotations.first_annotation[i : i + 2].tolist()
        yield ExportImage(
            name=path.relative_to(annotations.images_dir).as_posix() if inside else path.name,
            path=path,
            image_hw=(height, width),
            objects=[_object(annotations, row) for row in range(first, stop)],
            id=annotations.image_id(i),
            neg_category_ids=annotations.neg_category_ids[i].tolist() if stated else None,
            not_exhaustive_category_ids=annotations.not_exhaustive_category_ids[i].tolist() if stated else None,
        )


def _object(annotations: Annotations, row: int) -> ExportObject:
    x, y, w, h = annotations.boxes_xywh[row].tolist()
    return ExportObject(
        label=int(annotations.labels[row]),
        box=(x, y, w, h),
        segmentation=annotations.segmentation(row),
        area=float(annotations.areas[row]),
        crowd=bool(annotations.crowd[row]),
        ignored=bool(annotations.ignored[row]),
        id=int(annotations.annotation_ids[row]),
    )


def single_objects(image: ExportImage, name: str, found: LeftOut) -> list[ExportObject]:
    """The objects of an image but crowds and ignored ones, which are counted, with the image's ``name``."""
    kept = []
    for item in image.objects:
        if item.crowd or item.ignored:
            found.add(
                f"{'crowds' if item.crowd else 'ignored objects'} left out: the format has no mark for them", name
            )
        else:
            kept.append(item)
    return kept


def class_names(data: ExportSet) -> list[str]:
    """The categories' names, without spaces around them, for a format that tells classes by their names.

    Raises:
        UserError: two are the same, or one is empty or has characters that are no text.
    """
    known: dict[str, int] = {}
    for category in data.categories:
        name = category.name.strip()
        if not name or any(unicodedata.category(sign) == "Cc" or sign in "\ufffe\uffff" for sign in name):
            raise UserError(
                f"{data.where}: category {category.id} has the name {category.name!r}; give it one of plain text"
            )
        if name in known:
            ids = f"{known[name]} and {category.id}"
            raise UserError(f"{data.where}: the categories {ids} are both called {name!r}; give each its own name")
        known[name] = category.id
    return list(known)
