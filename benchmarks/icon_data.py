"""Icons over photographs with LVIS's counts, drawn into a data set in LVIS v1 format (`icons.py draw`).

Which classes are rare has nothing to do with what they look like: counts are dealt out by the seed. A picture depends
on the seed, its split and its number only, not on the processes that draw.
"""

from __future__ import annotations

import csv
import math
import multiprocessing
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import orjson
from icon_scenes import Wanted, annotation_rows, draw_scene, occluder
from icon_sets import Archive, attribution
from numpy.typing import NDArray

from tailseg.errors import UserError

SPLITS = ("train", "val", "val_heldout")
CLASSES_PER_IMAGE = 3.6  # as in LVIS v1 train
FEWEST_IMAGES = {"train": 1, "val": 8, "val_heldout": 8}  # of a class
MAX_OBJECTS = 8  # in an image
MOST_EXTRA = 2.0  # further objects of a class in an image, on average; LVIS has up to 36
NOT_EXHAUSTIVE_RATE = 0.04  # of images, with one class of which a further object is left unlabelled
NEGATIVES, ALIKE = 8, 4  # classes an image that are known to be absent; of these, share a word with what is there
OCCLUDER_RATE = 0.35  # of images, with a piece of another photograph that lies over some objects
WORDS = {"with", "and", "of", "in", "on", "the", "a"}  # that make no two classes alike


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is drawn; the same settings and archive give the same files."""

    classes: int
    train_images: int
    val_images: int
    size: int  # pixels, height and width
    seed: int


# ---------------------------------------------------------------------------------------------------------
# The long tail


def lvis_categories(path: Path) -> list[tuple[str, int, int]]:
    """Frequency, images and instances of LVIS's classes, most images first."""
    try:
        with path.open(newline="") as file:
            rows = [(r["frequency"], int(r["image_count"]), int(r["instance_count"])) for r in csv.DictReader(file)]
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); it lists LVIS's categories and their counts.") from error
    return sorted(rows, key=lambda row: -row[1])


def ranks(classes: int, of: int) -> NDArray[np.int64]:
    """(C,) which of LVIS's ranks C classes stand for: every one of 1,203, or some evenly between the ends."""
    return np.linspace(0, of - 1, classes).round().astype(np.int64)


def image_counts(lvis_images: Sequence[int], images: int, fewest: int) -> NDArray[np.int64]:
    """(C,) images of each class: LVIS's counts in the ratio of the images, none below ``fewest``.

    100,000 images for all 1,203 classes leave the counts as they are.

    Raises:
        UserError: where so few images cannot hold ``fewest`` of each class.
    """
    counts = np.asarray(lvis_images)
    low, high = 0.0, images / counts.min()
    total = CLASSES_PER_IMAGE * images
    if total < fewest * len(counts):
        least = math.ceil(fewest * len(counts) / CLASSES_PER_IMAGE)
        raise UserError(f"{images} images are too few for {fewest} of each of {len(counts)} classes; draw {least}.")
    for _ in range(60):
        scale = (low + high) / 2
        if np.rint(counts * scale).clip(fewest, images).sum() < total:
            low = scale
        else:
            high = scale
    scaled: NDArray[np.int64] = np.rint(counts * high).clip(fewest, images).astype(np.int64)
    return scaled


def fewest_val_images(classes: int) -> int:
    """Images that hold enough of each class with a quarter to spare, in which frequent classes are seen more often."""
    return math.ceil(1.25 * FEWEST_IMAGES["val"] * classes / CLASSES_PER_IMAGE)


def plan_images(counts: NDArray[np.int64], images: int, rng: np.random.Generator) -> list[list[int]]:
    """For each image its classes (ranks), so that class c lies in counts[c] images of similar fullness."""
    plan: list[list[int]] = [[] for _ in range(images)]
    load = np.zeros(images)
    for rank in rng.permutation(len(counts)):
        order = np.argpartition(load + 3 * rng.random(images), counts[rank] - 1)
        chosen = order[: counts[rank]]
        load[chosen] += 1
        for image in chosen.tolist():
            plan[image].append(int(rank))
    return plan


# ---------------------------------------------------------------------------------------------------------
# A data set


class Painter:
    """Draws the images of a data set, any of them, in any process."""

    def __init__(self, archive: Archive, lvis: Path, settings: Settings, folder: Path) -> None:
        self.archive, self.settings, self.folder = archive, settings, folder
        if not 2 <= settings.classes <= len(archive.names):
            raise UserError(f"{settings.classes} classes: choose 2 to {len(archive.names)}, as many as were fetched.")
        of_lvis = lvis_categories(lvis)
        rows = [of_lvis[rank] for rank in ranks(settings.classes, len(of_lvis))]
        self.groups = [row[0] for row in rows]
        # Further objects of a class in its images, on average.
        self.extra = [min(row[2] / row[1] - 1, MOST_EXTRA) for row in rows]
        rng = np.random.default_rng([settings.seed, 9])
        self.labels: list[int] = rng.permutation(len(archive.names))[: settings.classes].tolist()  # rank -> icon
        self.names = [archive.names[label] for label in self.labels]
        self.ids = (np.argsort(np.argsort(self.names)) + 1).tolist()  # ids follow names and tell no count
        self.styles = {
            split: [
                [s for s in archive.styles_of(label) if (s == archive.held_out) == (split == "val_heldout")]
                for label in self.labels
            ]
            for split in SPLITS
        }
        self.numbers = dict(zip(SPLITS, (settings.train_images, settings.val_images, settings.val_images), strict=True))
        self.plans = {}
        for index, split in enumerate(SPLITS):
            counts = image_counts([row[1] for row in rows], self.numbers[split], FEWEST_IMAGES[split])
            self.plans[split] = plan_images(counts, self.numbers[split], np.random.default_rng([settings.seed, index]))
        self.with_word: dict[str, list[int]] = {}
        for rank, name in enumerate(self.names):
            for word in set(name.split("_")) - WORDS:
                self.with_word.setdefault(word, []).append(rank)

    def paint(self, task: tuple[str, int]) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
        """Draw an image of a split; its row, those of its annotations, and how many objects were left out."""
        split, index = task
        rng = np.random.default_rng([self.settings.seed, SPLITS.index(split), index])
        classes = self.plans[split][index]
        photos = self.archive.photos[split == "train"]
        wanted, unlabelled = self.wanted(split, classes, rng)
        if rng.random() < OCCLUDER_RATE:
            wanted.append(Wanted(-1, occluder(photos[rng.integers(len(photos))], rng)))
        scene = draw_scene(wanted, photos[rng.integers(len(photos))], self.settings.size, rng)
        name = f"{split}_{index + 1:06d}.jpg"
        quality = [cv2.IMWRITE_JPEG_QUALITY, 90]
        (self.folder / "images" / name).write_bytes(bytes(cv2.imencode(".jpg", scene.image, quality)[1]))
        # Image ids differ between the splits, as in LVIS.
        before = sum(self.numbers[other] for other in SPLITS[: SPLITS.index(split)])
        row = {
            "id": before + index + 1,
            "file_name": name,
            "height": self.settings.size,
            "width": self.settings.size,
            "neg_category_ids": sorted(self.ids[rank] for rank in self.negatives(set(classes), rng)),
            "not_exhaustive_category_ids": sorted(self.ids[rank] for rank in unlabelled),
        }
        lost = len(wanted) - len(scene.objects)
        return row, [{"image_id": row["id"], **found} for found in annotation_rows(scene, self.ids)], lost

    def wanted(self, split: str, classes: list[int], rng: np.random.Generator) -> tuple[list[Wanted], list[int]]:
        """The objects of an image, and the classes of which some are not annotated."""
        extra = [rank for rank in classes for _ in range(rng.poisson(self.extra[rank]))]
        rng.shuffle(extra)
        unlabelled = [classes[rng.integers(len(classes))]] if rng.random() < NOT_EXHAUSTIVE_RATE and classes else []
        plan = [(rank, True, True) for rank in classes]
        plan += [(rank, True, False) for rank in extra[: max(0, MAX_OBJECTS - len(classes))]]
        plan += [(rank, False, False) for rank in unlabelled]
        wanted = []
        for rank, annotated, needed in plan:
            styles = self.styles[split][rank]
            icon = self.archive.icon(self.labels[rank], styles[rng.integers(len(styles))])
            wanted.append(Wanted(rank, icon, annotated, needed))
        return wanted, unlabelled

    def negatives(self, present: set[int], rng: np.random.Generator) -> list[int]:
        """Some classes that are not in the image: those that share a word with one that is, and any others."""
        words = {word for rank in present for word in self.names[rank].split("_")}
        alike = sorted({rank for word in words for rank in self.with_word.get(word, ())} - present)
        first: list[int] = rng.permutation(alike)[:ALIKE].tolist()
        taken = present.union(first)
        others = [rank for rank in rng.permutation(len(self.names)).tolist() if rank not in taken]
        return first + others[: NEGATIVES - len(first)]


_painter: Painter  # of a drawing process


def _start(painter: Painter) -> None:
    global _painter
    cv2.setNumThreads(1)
    _painter = painter


def _paint(task: tuple[str, int]) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
    return _painter.paint(task)


def draw(
    archive: Path, lvis: Path, settings: Settings, out: Path, *, jobs: int, progress: Callable[[int], object]
) -> list[str]:
    """Draw a data set: ``train.json``, ``val.json``, ``val_heldout.json``, ``heldout.yaml``, ``images/``.

    The folder appears when everything in it is written. Categories carry the counts of their own file and train's
    frequency group, that of the LVIS class whose count they have.

    Args:
        archive: what `icon_sets.fetch` wrote.
        lvis: LVIS's categories and counts (CSV).
        settings: what to draw.
        out: a folder that does not exist yet.
        jobs: processes.
        progress: called after each image with how many are done.

    Returns:
        Lines on what was drawn.

    Raises:
        UserError: where ``out`` exists or a file cannot be used.
    """
    if out.exists():
        raise UserError(f"{out} is there already; name a new folder or remove it first.")
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        folder = scratch / "content"  # unlike the scratch folder itself, readable for others
        (folder / "images").mkdir(parents=True)
        painter = Painter(Archive(archive), lvis, settings, folder)
        lines, done = [], 0
        with multiprocessing.Pool(jobs, _start, (painter,)) as pool:
            for split in SPLITS:
                tasks = [(split, index) for index in range(painter.numbers[split])]
                rows = []
                for row in pool.imap(_paint, tasks, chunksize=32):
                    rows.append(row)
                    done += 1
                    progress(done)
                lines.append(_write_split(folder, split, painter, rows))
        (folder / "heldout.yaml").write_text("train: train.json\nval: val_heldout.json\nimages: images\n")
        folder.replace(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return lines


def _write_split(
    folder: Path, split: str, painter: Painter, drawn: list[tuple[dict[str, Any], list[dict[str, Any]], int]]
) -> str:
    """Write a split's annotation file; returns a line on it."""
    images = [row for row, _, _ in drawn]
    found = [row for _, rows, _ in drawn for row in rows]
    objects = Counter(row["category_id"] for row in found)
    in_images = Counter(category for category, _ in {(row["category_id"], row["image_id"]) for row in found})
    categories = [
        {
            "id": category,
            "name": name,
            "synset": f"{name}.n.01",
            "synonyms": [name],
            "def": f"the icon {name}",
            "frequency": group,
            "image_count": in_images[category],
            "instance_count": objects[category],
        }
        for category, name, group in sorted(zip(painter.ids, painter.names, painter.groups, strict=True))
    ]
    description = f"Icons over photographs with LVIS v1's counts. Icons: {attribution()}."
    content = {
        "info": {"description": description, "settings": asdict(painter.settings)},
        "images": images,
        "annotations": [{"id": index, **row} for index, row in enumerate(found, 1)],
        "categories": categories,
        "licenses": [],
    }
    (folder / f"{split}.json").write_bytes(orjson.dumps(content))
    numbers = [row["instance_count"] for row in categories]
    lost = sum(number for _, _, number in drawn)
    return (
        f"{split}: {len(images):,} images, {len(found):,} objects, {min(numbers):,} to {max(numbers):,} a class; "
        f"{lost:,} found no place and were left out"
    )
