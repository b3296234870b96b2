"""The built-in data set: drawn pictures of confusable objects with LVIS's long tail, in LVIS v1 format.

A class is a texture, a colour and a shape (``striped_red_star``). Frequent classes lie far apart; every other
class is a frequent one with a single property changed, so each rare class has a look-alike that is seen many
times more often, which is where long-tailed training goes wrong. How many images a class gets follows LVIS's
own curve, down to a single one. The picture of an image depends on the seed, the split, its number and its planned
classes only.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import orjson
from hotcoco import mask as rle
from numpy.typing import NDArray

from tailseg.data.annotations.cache import cache_folder
from tailseg.data.synthetic.scenes import MAX_OBJECTS, ObjectClass, Scene, draw_scene, object_classes
from tailseg.errors import UserError
from tailseg.files import new_folder
from tailseg.recipes.data_section import COMMON_MAX, RARE_MAX

Split = Literal["train", "val"]

VERSION = 2  # raise it when a drawn byte or a written number changes: caches are named after it
MAX_CLASSES = 1203  # as many as LVIS v1

# Images of a class in LVIS v1 train, by rank quantile (0 = the most frequent class), rounded; straight lines
# between the points on a log scale.
LVIS_QUANTILES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 0.95, 1.0)
LVIS_IMAGES = (1980.0, 1880.0, 1400.0, 640.0, 360.0, 130.0, 65.0, 37.0, 12.0, 3.0, 1.3, 1.0)

CLASSES_PER_IMAGE = 3.2  # LVIS train: 3.6
LARGEST_SHARE = 0.6  # of all images, for the most frequent class
FEWEST_VAL_IMAGES = 8  # of the rarest class: AP needs a few objects to be a number
LOOK_ALIKE_NEGATIVES, OTHER_NEGATIVES = 4, 4  # classes an image


@dataclass(frozen=True, kw_only=True)
class SyntheticSettings:
    """Settings of the built-in data set; the same settings give the same bytes.

    Raises:
        UserError: where a number is out of its range.

    """

    classes: int = 120  # 2 to 1203
    train_images: int = 6000
    val_images: int = 400
    size: int = 128  # pixels, height and width, at least 32
    rarest: int = 1  # training images of the rarest class, as in LVIS; the curve to the most frequent one follows
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {
            "classes": (2, MAX_CLASSES),
            "train_images": (1, 10_000_000),
            "val_images": (1, 10_000_000),
            "size": (32, 8192),
            "rarest": (1, 1_000_000),
            "seed": (0, 2**63 - 1),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserError(f"synthetic data: {name} is {value}; choose a whole number from {low} to {high}.")


# ---------------------------------------------------------------------------------------------------------
# The long tail


def lvis_curve(quantiles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Training images of the LVIS v1 class at each rank quantile in [0, 1], 0 being the most frequent."""
    log_images = np.interp(quantiles, LVIS_QUANTILES, np.log(LVIS_IMAGES))
    return np.asarray(np.exp(log_images))


def rescale(lvis_images: Any, fewest: float, most: float) -> NDArray[np.float64]:
    """LVIS image counts, their logarithm stretched so that 1 becomes ``fewest`` and the largest ``most``."""
    height = np.log(lvis_images) / np.log(LVIS_IMAGES[0])  # 0 for the rarest class, 1 for the most frequent
    return np.asarray(fewest * (most / fewest) ** height)


def curve_ends(classes: int, images: int, fewest: int) -> tuple[float, float]:
    """Images of the rarest and the most frequent class, for ``CLASSES_PER_IMAGE`` on average.

    Sets too small for this get a shorter tail, down to one image for every class.
    """
    mean = CLASSES_PER_IMAGE * images / classes
    low = float(max(1, min(fewest, int(mean), images)))
    most_low, most_high = low, max(low, LARGEST_SHARE * images)
    lvis = lvis_curve((np.arange(classes) + 0.5) / classes)
    for _ in range(50):  # bisection: the mean grows with the largest count
        most = (most_low + most_high) / 2
        if rescale(lvis, low, most).mean() < mean:
            most_low = most
        else:
            most_high = most
    return low, most_low


def image_counts(classes: int, images: int, fewest: int) -> NDArray[np.int64]:
    """(C,) planned images of each class, most frequent first, along LVIS's curve."""
    ends = curve_ends(classes, images, fewest)
    counts = rescale(lvis_curve((np.arange(classes) + 0.5) / classes), *ends)
    return np.rint(counts).clip(1, images).astype(np.int64)


def frequency_thresholds(classes: int, images: int, fewest: int) -> tuple[int, int]:
    """Most training images of a rare and of a common class: LVIS's 10 and 100 on this set's scale."""
    ends = curve_ends(classes, images, fewest)
    rare, common = rescale([RARE_MAX, COMMON_MAX], *ends)
    return int(rare), int(common)


def plan_images(counts: NDArray[np.int64], images: int, rng: np.random.Generator) -> list[list[int]]:
    """For each image its classes (ranks), so that class c lies in counts[c] images of similar fullness.

    Where the images have no room left, a class gets fewer.
    """
    plan: list[list[int]] = [[] for _ in range(images)]
    load = np.zeros(images)
    for rank in rng.permutation(len(counts)):
        emptiest = np.argsort(load + 3 * rng.random(images), kind="stable")
        chosen = emptiest[load[emptiest] < MAX_OBJECTS][: counts[rank]]
        load[chosen] += 1
        for image in chosen:
            plan[image].append(int(rank))
    return plan


# ---------------------------------------------------------------------------------------------------------
# The files


def _annotations(scene: Scene, ids: list[int]) -> list[dict[str, Any]]:
    """The annotated objects of a scene; ids[rank] is a category id. Masks hold the visible pixels."""
    rows = []
    for index, (label, annotated) in enumerate(zip(scene.labels, scene.annotated, strict=True)):
        if not annotated:
            continue
        mask = scene.owner == index
        ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = [xs[0], ys[0], xs[-1] + 1 - xs[0], ys[-1] + 1 - ys[0]]
        encoded = rle.encode(mask)
        rows.append(
            {
                "category_id": ids[label],
                "bbox": [float(side) for side in box],
                "area": float(mask.sum()),
                "segmentation": {"size": encoded["size"], "counts": encoded["counts"].decode()},
            }
        )
    return rows


def _negatives(present: set[int], kinds: list[ObjectClass], rng: np.random.Generator) -> list[int]:
    """Some ranks that are not in the image: look-alikes of what is, and any others."""
    absent = [int(rank) for rank in rng.permutation(len(kinds)) if rank not in present]
    alike = [rank for rank in absent if any(kinds[rank].differs_by_one(kinds[p]) for p in present)]
    first = alike[:LOOK_ALIKE_NEGATIVES]
    others = [rank for rank in absent if rank not in first][: LOOK_ALIKE_NEGATIVES + OTHER_NEGATIVES - len(first)]
    return first + others


def _write_split(
    folder: Path,
    split: Split,
    settings: SyntheticSettings,
    kinds: list[ObjectClass],
    ids: list[int],
    image_done: Callable[[], None],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Draw a split's pictures; returns the rows of its images and of its annotations."""
    train = split == "train"
    number = settings.train_images if train else settings.val_images
    key = (settings.seed, 0 if train else 1)
    counts = image_counts(settings.classes, number, settings.rarest if train else FEWEST_VAL_IMAGES)
    plan = plan_images(counts, number, np.random.default_rng([*key, 0]))
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, labels in enumerate(plan, start=1):
        # One generator an image: a picture does not depend on those drawn before it.
        rng = np.random.default_rng([*key, index])
        scene = draw_scene(labels, kinds, settings.size, rng)
        name = f"{split}_{index:06d}.jpg"
        # Image ids differ between the splits, as in LVIS.
        image_id = index if train else settings.train_images + index
        rows = _annotations(scene, ids)
        annotations += [{"id": len(annotations) + i, "image_id": image_id, **row} for i, row in enumerate(rows, 1)]
        images.append({"id": image_id, "file_name": name, **_image_row(scene, kinds, ids, rng)})
        _write_picture(folder / "images" / name, scene.image)
        image_done()
    return images, annotations


def _image_row(scene: Scene, kinds: list[ObjectClass], ids: list[int], rng: np.random.Generator) -> dict[str, Any]:
    """LVIS's fields of an image besides its id and file."""
    known = {label for label, annotated in zip(scene.labels, scene.annotated, strict=True) if annotated}
    left_out = {label for label, annotated in zip(scene.labels, scene.annotated, strict=True) if not annotated}
    return {
        "height": scene.owner.shape[0],
        "width": scene.owner.shape[1],
        "neg_category_ids": sorted(ids[label] for label in _negatives(set(scene.labels), kinds, rng)),
        "not_exhaustive_category_ids": sorted(ids[label] for label in left_out & known),
    }


def _write_picture(path: Path, image: NDArray[np.uint8]) -> None:
    # Full colour resolution: class colours are told apart on objects of twenty pixels.
    options = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR]
    done, data = cv2.imencode(".jpg", image, [*options, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444])
    assert done
    path.write_bytes(data.tobytes())


def _categories(kinds: list[ObjectClass], ids: list[int], annotations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """LVIS's category table, without ``frequency``; the counts are those of ``annotations``."""
    instances = np.bincount([row["category_id"] for row in annotations], minlength=len(ids) + 1)
    pairs = {(row["category_id"], row["image_id"]) for row in annotations}
    images = np.bincount([category for category, _ in pairs], minlength=len(ids) + 1)
    return sorted(
        (
            {
                "id": category,
                "name": kind.name,
                "synset": f"{kind.name}.n.01",
                "synonyms": [kind.name],
                "def": f"a {kind.colour} {kind.shape}, {kind.texture}",
                "image_count": int(images[category]),
                "instance_count": int(instances[category]),
            }
            for kind, category in zip(kinds, ids, strict=True)
        ),
        key=lambda row: row["id"],
    )


def _write_all(folder: Path, settings: SyntheticSettings, progress: Callable[[int, int], None] | None) -> None:
    (folder / "images").mkdir()
    curve = (settings.classes, settings.train_images, settings.rarest)
    rare_max, common_max = frequency_thresholds(*curve)
    planned = image_counts(*curve)
    kinds = object_classes(settings.classes, max(1, int((planned > common_max).sum())))
    # Ids in the order of the names, as in LVIS: nothing about the frequency is to be read from them.
    ids = (np.argsort(np.argsort([kind.name for kind in kinds])) + 1).tolist()
    done, total = 0, settings.train_images + settings.val_images

    def image_done() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    info = {
        "description": "tailseg synthetic data set in LVIS v1 format; frequency is by images of train.json: "
        "r up to rare_max_images, c up to common_max_images, f above.",
        "version": str(VERSION),
        "settings": asdict(settings),
        "rare_max_images": rare_max,
        "common_max_images": common_max,
    }
    frequency: dict[int, str] = {}
    for split in ("train", "val"):
        images, annotations = _write_split(folder, split, settings, kinds, ids, image_done)
        categories = _categories(kinds, ids, annotations)
        if split == "train":
            for row in categories:
                count = row["image_count"]
                frequency[row["id"]] = "r" if count <= rare_max else "c" if count <= common_max else "f"
        categories = [{**row, "frequency": frequency[row["id"]]} for row in categories]
        content = {"info": info, "images": images, "annotations": annotations, "categories": categories}
        (folder / f"{split}.json").write_bytes(orjson.dumps({**content, "licenses": []}))


def write_synthetic(
    out: Path, settings: SyntheticSettings, *, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Draw the data set into ``out``: ``train.json``, ``val.json`` and ``images/``.

    The files are LVIS v1: categories with ``frequency``, ``image_count`` and ``instance_count`` (the counts
    are those of the file itself, the frequency is train's in both), images with ``neg_category_ids`` and
    ``not_exhaustive_category_ids``, masks as compressed RLE of the visible pixels. The folder appears when
    everything in it is written; an interrupted run leaves nothing behind.

    Unlike LVIS's, the validation split has at least eight images of every class where its size allows, so
    that AP of the rare classes rests on more than one or two objects.

    Args:
        out: a folder that does not exist yet or is empty.
        settings: what to draw.
        progress: called after each image with the images done and their total.

    Returns:
        ``out``.

    Raises:
        UserError: where ``out`` is not empty or no folder can be made there.

    """
    with new_folder(out) as content:
        _write_all(content, settings, progress)
    return out


def default_synthetic_folder(settings: SyntheticSettings) -> Path:
    """The folder where a data set of these settings is kept: in ``$TAILSEG_CACHE``, else in ``~/.cache/tailseg``."""
    identity = orjson.dumps([VERSION, asdict(settings)], option=orjson.OPT_SORT_KEYS)
    name = f"synthetic-{hashlib.sha256(identity).hexdigest()[:12]}"
    return cache_folder() / name


def open_synthetic(settings: SyntheticSettings, *, progress: Callable[[int, int], None] | None = None) -> Path:
    """The folder of these settings in the cache, drawn first if it is not there, or no longer as it was drawn.

    Processes that start at once each draw their own copy; the first to finish puts it in place.

    Raises:
        UserError: where the cache cannot be written.

    """
    folder = default_synthetic_folder(settings)
    note = folder.with_suffix(".hash")
    if is_drawn(settings):
        found = _hash_of(folder)
        if not note.is_file():  # drawn by an earlier version, or by a process that was killed now
            _note(note, found)
        if not note.is_file() or note.read_bytes() == found:
            return folder
        shutil.rmtree(folder)
    try:
        write_synthetic(folder, settings, progress=progress)
        _note(note, _hash_of(folder))
    except (OSError, UserError):
        if not is_drawn(settings):  # another process was first
            raise
    return folder


def is_drawn(settings: SyntheticSettings) -> bool:
    """Whether the data set of these settings is in the cache."""
    return (default_synthetic_folder(settings) / "val.json").is_file()


def _note(path: Path, content: bytes) -> None:
    """Write a small file, whole or not at all, where the cache can be written."""
    with contextlib.suppress(OSError):
        part = path.with_name(f".{path.name}.{os.getpid()}")
        part.write_bytes(content)
        part.replace(path)


def _hash_of(folder: Path) -> bytes:
    """A hash of all files of a data set and of their names."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder)} {len(content)}\n".encode() + content)
    return digest.hexdigest().encode()
