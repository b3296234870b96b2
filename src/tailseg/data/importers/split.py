"""Divide one annotated set into training and validation images so that rare classes reach both sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tailseg.data.importers.writer import Part, Row
from tailseg.errors import UserError


def stratified_validation(
    pairs: NDArray[np.int64], image_count: int, class_count: int, share: float, seed: int
) -> NDArray[np.bool_]:
    """Choose the images of validation by iterative stratification (Sechidis et al. 2011), the rarest class first.

    A class in one image stays in training; one in n >= 2 images sends max(1, round(share * n)) of them to validation
    as far as the choices made for rarer classes allow, so a small set gives validation more than its share. Every class
    that has images keeps one in training.

    Args:
        pairs: (P, 2) image and class, both counted from 0; each pair once.
        image_count: I.
        class_count: C.
        share: of each class's images, in (0, 1).
        seed: of the choice among images that serve alike.

    Returns:
        (I,) bool, True for validation.
    """
    rng = np.random.default_rng(seed)
    by_image = pairs[np.argsort(pairs[:, 0], kind="stable")]
    first = np.searchsorted(by_image[:, 0], np.arange(image_count + 1))
    by_class = pairs[np.argsort(pairs[:, 1], kind="stable")]
    class_first = np.searchsorted(by_class[:, 1], np.arange(class_count + 1))

    def classes(image: int) -> NDArray[np.int64]:
        return by_image[first[image] : first[image + 1], 1]

    val = np.zeros(image_count, np.bool_)
    settled = np.zeros(image_count, np.bool_)
    in_train = np.diff(class_first)  # images of each class that are not in validation
    sizes = in_train.copy()
    wanted = np.where(sizes >= 2, np.maximum(1, np.floor(share * sizes + 0.5)), 0).astype(np.int64)

    def choose(among: NDArray[np.int64], count: int, *, dense: bool) -> None:
        """Send up to ``count`` images to validation; if ``dense``, first those that serve other classes too."""
        among = rng.permutation(among)
        if dense:
            missing = np.sign(wanted - (sizes - in_train))
            serves = np.array([missing[classes(image)].sum() for image in among.tolist()])
            among = among[np.argsort(-serves, kind="stable")]
        for image in among.tolist():
            if count <= 0:
                return
            if (in_train[classes(image)] >= 2).all():
                val[image] = True
                in_train[classes(image)] -= 1
                count -= 1

    order = np.argsort(sizes, kind="stable")
    for label in order[sizes[order] > 0].tolist():
        images = by_class[class_first[label] : class_first[label + 1], 0]
        choose(
            images[~settled[images]], int(wanted[label] - np.count_nonzero(val[images])), dense=share * len(images) < 1
        )
        settled[images] = True
    for label in np.flatnonzero((wanted > 0) & (in_train == sizes)).tolist():  # rarer classes took all to training
        choose(by_class[class_first[label] : class_first[label + 1], 0], 1, dense=True)
    empty = np.flatnonzero(np.diff(first) == 0)
    val[rng.permutation(empty)[: int(share * len(empty) + 0.5)]] = True
    if image_count >= 2 and not val.any():
        spare = [image for image in range(image_count) if (in_train[classes(image)] >= 2).all()]
        val[spare[:1]] = True
    return val


def class_images(rows: Sequence[Row], image_ids: Sequence[int], category_ids: Sequence[int]) -> NDArray[np.int64]:
    """(P, 2) image and class positions of annotation rows, crowds left out, each pair once."""
    images = {image_id: i for i, image_id in enumerate(image_ids)}
    labels = {category_id: i for i, category_id in enumerate(category_ids)}
    real = [row for row in rows if not row.get("iscrowd")]
    pairs = [(images[row["image_id"]], labels[row["category_id"]]) for row in real]
    return np.unique(np.array(pairs, np.int64).reshape(-1, 2), axis=0)


@dataclass(frozen=True, slots=True)
class Division:
    """A set divided in two, and the classes that could not reach validation."""

    parts: dict[str, Part]
    only_train: list[str]  # names of classes with objects, none of them in validation


def divide(part: Part, categories: Sequence[Row], *, share: float, seed: int, source: Path) -> Division:
    """``part`` as training and validation.

    Raises:
        UserError: no image can be spared for validation.
    """
    pairs = class_images(part.annotations, [row["id"] for row in part.images], [row["id"] for row in categories])
    val = stratified_validation(pairs, len(part.images), len(categories), share, seed)
    if not val.any() or val.all():
        raise UserError(
            f"{source}: none of its {len(part.images)} images can be spared for validation, since every one shows a "
            "class that no other shows; annotate more images"
        )
    parts = {}
    for split, chosen in (("train", ~val), ("val", val)):
        places = np.flatnonzero(chosen).tolist()
        ids = {part.images[i]["id"] for i in places}
        parts[split] = Part(
            images=[part.images[i] for i in places],
            files=[part.files[i] for i in places],
            annotations=[row for row in part.annotations if row["image_id"] in ids],
        )
    reached = np.isin(np.arange(len(categories)), pairs[val[pairs[:, 0]], 1])
    has = np.isin(np.arange(len(categories)), pairs[:, 1])
    return Division(parts, [categories[i]["name"] for i in np.flatnonzero(has & ~reached).tolist()])
