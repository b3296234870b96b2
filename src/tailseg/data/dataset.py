"""From an image file and its annotations to a `Sample`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from tailseg.data.annotations.annotations import Annotations
from tailseg.data.annotations.masks import Bitmap, bitmap_of, into_grid
from tailseg.data.annotations.oddities import CROWDS_FIX
from tailseg.data.copy_paste import CopyPaste, Drawn, Patch, paste, patch_of
from tailseg.data.ignored_regions import painted
from tailseg.data.images import decode, to_rgb
from tailseg.data.instaboost import InstaBoost, Objects
from tailseg.data.transforms import Compose, Image, clip_boxes, fit_transform, train_transform
from tailseg.errors import UserError
from tailseg.recipes.data_section import MASK_GRID, DataRecipe
from tailseg.structures import Instances, Sample, joined

OF_A_REGION = -1  # label, while it is moved with the objects
MIN_TRAIN_SIDE = 32  # pixels; MMDetection's ``filter_cfg`` for LVIS


def _channels_first(image: Image) -> Tensor:
    """(H, W, 3) uint8 -> (3, H, W) uint8."""
    planes = torch.empty((3, *image.shape[:2]), dtype=torch.uint8)
    cv2.split(image, list(planes.numpy()))  # four times faster than a transposed copy
    return planes


def trained_images(annotations: Annotations, *, keep_empty: bool = False) -> NDArray[np.int64]:
    """The images that training uses: with an object to train on, and with sides that are not too short.

    With ``keep_empty`` also those without any annotation, in which all is background. An image whose annotations are
    all crowds, or otherwise not trained on, stays out: it is not known to be empty.
    """
    starts = np.concatenate([[0], np.cumsum(annotations.trained)])[annotations.first_annotation]
    used = np.diff(starts) > 0
    if keep_empty:
        used |= np.diff(annotations.first_annotation) == 0
    return np.flatnonzero(used & (annotations.image_sizes.min(axis=1) >= MIN_TRAIN_SIDE))


def why_untrained(annotations: Annotations) -> tuple[str, str]:
    """Of a file with no image that training could use: what became of most annotations, and the fix."""
    report = annotations.report
    if annotations.trained.any():
        return f"images with a side under {MIN_TRAIN_SIDE} pixels are left out", "take larger images"
    if not report.annotations:
        return "it has no annotations", "annotate some images"
    shares = "write bbox and segmentation in pixels, not as shares of the image's sides"
    reasons = [
        (report.crowd, "crowds", CROWDS_FIX),
        (report.ignored, 'objects with "ignore"', "take that off the objects that count"),
        (report.thin, "objects under a pixel wide or high", shares),
        *((odd.count, odd.about.meaning, odd.about.fix) for odd in report.oddities if odd.about.severity != "note"),
    ]
    count, meaning, fix = max(reasons, key=lambda reason: reason[0])
    return f"{count:,} {meaning}", fix


class DetectionDataset(Dataset[Sample]):
    """The images of an annotation file with their objects.

    An item is asked for by ``(index, seed)``. All chance in a sample comes from its seed, so samples depend
    neither on the number of workers nor on what was asked for before.

    Attributes:
        annotations: the file.
        image_indices: (len,) int64, the position in the file of each image of the data set.
        aspect_groups: (len,) bool, True where width < height.
    """

    def __init__(
        self,
        annotations: Annotations,
        transform: Compose,
        *,
        drop_empty: bool,
        keep_empty: bool = False,
        mask_grid: int = MASK_GRID,
        instaboost: InstaBoost | None = None,
        copy_paste: CopyPaste | None = None,
        with_objects: bool = True,
    ) -> None:
        """Make a data set.

        Args:
            annotations: the file.
            transform: applied to each image and its objects.
            drop_empty: leave out images without objects and those with a side below 32 pixels (training).
            keep_empty: of these, keep the ones without any annotation (see `trained_images`).
            mask_grid: cells of a mask's side; S = mask_grid + 2.
            instaboost: applied to some images before the transform, if given.
            copy_paste: likewise, after InstaBoost.
            with_objects: False gives samples as if nothing were annotated, to detect in: no mask is painted.

        Raises:
            UserError: no image is left.
        """
        self.annotations = annotations
        self.transform = transform
        self.mask_grid = mask_grid
        self.instaboost = instaboost
        self.copy_paste = copy_paste
        self.with_objects = with_objects
        images = trained_images(annotations, keep_empty=keep_empty) if drop_empty else np.arange(len(annotations))
        self.image_indices: NDArray[np.int64] = images
        if images.size == 0 or (drop_empty and not annotations.trained.any()):
            reason, fix = why_untrained(annotations)
            raise UserError(f"{annotations.path}: no annotation to train on ({reason}); {fix}")
        hws = annotations.image_sizes[images]
        self.aspect_groups: NDArray[np.bool_] = hws[:, 1] < hws[:, 0]

    def __len__(self) -> int:
        """The number of images."""
        return len(self.image_indices)

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of an image as the transform gives it, where that does nothing by chance."""
        height, width = self.annotations.image_sizes[self.image_indices[index]].tolist()
        return self.transform.size((height, width))

    def __getitem__(self, item: tuple[int, int] | int) -> Sample:
        """The sample of (index, seed); an index alone stands for seed 0.

        Raises:
            UserError: the image is missing or broken, or has another size than the file says.
        """
        index, seed = item if isinstance(item, tuple) else (item, 0)
        position = int(self.image_indices[index])
        height, width = self.annotations.image_sizes[position].tolist()
        rows = self.annotations.rows(position) if self.with_objects else np.zeros(0, np.int64)
        absent = self._absent(position)
        jitter = self.instaboost.chance(seed) if self.instaboost is not None and len(rows) > 0 else None
        pasting = self.copy_paste.chance(seed) if self.copy_paste is not None and self.with_objects else None
        whole = jitter is not None or pasting is not None
        pixels = self._image(position, 1 if whole else self.transform.reduction((height, width), seed))
        if whole:
            objects = self._objects(rows, (height, width))
            if self.instaboost is not None and jitter is not None:
                pixels, objects = self.instaboost(pixels, objects, jitter)
            if self.copy_paste is not None and pasting is not None:
                barred = np.zeros_like(absent) if self.annotations.exhaustive else absent
                drawn = self.copy_paste.draw(barred, pasting)
                pixels, objects = paste(pixels, objects, self._patches(drawn, position, (height, width)))
                if self.annotations.exhaustive:  # else nothing is pasted of what is absent
                    absent[objects.labels] = False
            instances = self._instances(objects.boxes, objects.labels, objects.bitmaps, (height, width))
        else:
            boxes, labels = self._boxes(rows, (height, width)), self.annotations.labels[rows]
            instances = self._instances(boxes, labels, self._bitmaps(rows, (height, width)), (height, width))
        regions = self._regions(position, (height, width))
        if len(regions) > 0:
            instances = joined(instances, regions)
        reduction = height // pixels.shape[0]
        if reduction > 1:  # of a power of two, so nothing is rounded
            boxes, frames = instances.boxes / reduction, instances.mask_frames / reduction
            instances = replace(instances, boxes=boxes, mask_frames=frames)
        image, instances = self.transform(pixels, instances, np.random.default_rng(seed))
        ignored = {}
        if len(regions) > 0:
            is_region = instances.labels == OF_A_REGION
            ignored = {"ignored": painted(instances[is_region], image.shape[:2])}
            instances = instances[~is_region]
        return Sample(
            image=_channels_first(image),
            instances=instances,
            absent=torch.from_numpy(absent),
            image_id=int(self.annotations.image_ids[position]),
            original_hw=(height, width),
            **ignored,
        )

    def _regions(self, position: int, image_hw: tuple[int, int]) -> Instances:
        """What is neither object nor background in an image, as instances, for the transforms to move."""
        rows = self.annotations.ignored_rows(position) if self.with_objects else np.zeros(0, np.int64)
        labels = np.full(len(rows), OF_A_REGION)
        return self._instances(self._boxes(rows, image_hw), labels, self._bitmaps(rows, image_hw), image_hw)

    def _patches(self, drawn: Iterable[Drawn], position: int, image_hw: tuple[int, int]) -> Iterator[Patch]:
        """Objects to be pasted into the image at ``position``, its own left out."""
        annotations = self.annotations
        for one in drawn:
            source = annotations.image_of(one.row)
            if source == position:
                continue
            source_hw: tuple[int, int] = tuple(annotations.image_sizes[source].tolist())
            pixels = self._image(source, one.reduction(source_hw, image_hw))
            bitmap = bitmap_of(annotations.segmentation(one.row), source_hw)
            yield patch_of(one, pixels, source_hw, bitmap, int(annotations.labels[one.row]), image_hw)

    def _absent(self, position: int) -> NDArray[np.bool_]:
        if self.with_objects:
            return self.annotations.absent(position)
        return np.zeros(len(self.annotations.categories), np.bool_)

    def _image(self, position: int, reduction: int) -> Image:
        """The pixels in the orientation that the annotations were made in, reduced or (if no JPEG) whole."""
        path = self.annotations.image_path(position)
        decoded, reduced = decode(path, reduction)
        height, width = self.annotations.image_sizes[position].tolist()
        image = to_rgb(decoded, path, upright=True)
        true_h, true_w = image.shape[0] * reduced, image.shape[1] * reduced
        if (true_h, true_w) == (height, width):
            return image
        if (decoded.height * reduced, decoded.width * reduced) == (height, width):
            return to_rgb(decoded, path, upright=False)  # annotated by a tool that ignores EXIF
        found, stated = f"{true_w} x {true_h}", f"{width} x {height}"
        place = f"{self.annotations.path} (image {self.annotations.image_id(position)})"
        message = f"{path}: the image is {found} pixels but {place} says {stated}"
        raise UserError(f"{message}; correct the entry or restore the image")

    def _boxes(self, rows: NDArray[np.int64], image_hw: tuple[int, int]) -> NDArray[np.float32]:
        """The boxes of some annotations, clipped to their image."""
        boxes: NDArray[np.float32] = clip_boxes(torch.from_numpy(self.annotations.boxes[rows]), image_hw).numpy()
        return boxes

    def _bitmaps(self, rows: NDArray[np.int64], image_hw: tuple[int, int]) -> Iterator[Bitmap]:
        """The bitmaps of some annotations, one at a time: each may be as large as the image."""
        return (bitmap_of(self.annotations.segmentation(int(row)), image_hw) for row in rows)

    def _objects(self, rows: NDArray[np.int64], image_hw: tuple[int, int]) -> Objects:
        """Some annotations of an image, boxes clipped to it."""
        labels, bitmaps = self.annotations.labels[rows], tuple(self._bitmaps(rows, image_hw))
        return Objects(boxes=self._boxes(rows, image_hw), labels=labels, bitmaps=bitmaps)

    def _instances(
        self,
        boxes: NDArray[np.float32],
        labels: NDArray[np.int64],
        bitmaps: Iterable[Bitmap],
        image_hw: tuple[int, int],
    ) -> Instances:
        """Objects with their masks laid into grids."""
        side = self.mask_grid + 2
        masks = np.zeros((len(labels), side, side), np.uint8)
        frames = np.zeros((len(labels), 4), np.float32)
        for i, bitmap in enumerate(bitmaps):
            masks[i], frames[i] = into_grid(bitmap, image_hw, self.mask_grid)
        return Instances(
            boxes=torch.from_numpy(boxes),
            labels=torch.from_numpy(labels),
            masks=torch.from_numpy(masks),
            mask_frames=torch.from_numpy(frames),
        )


def train_dataset(annotations: Annotations, recipe: DataRecipe) -> DetectionDataset:
    """The training split with the recipe's augmentation; images without annotations only if it keeps them."""
    return DetectionDataset(
        annotations,
        train_transform(recipe),
        drop_empty=True,
        keep_empty=recipe.keep_empty,
        mask_grid=recipe.mask_grid,
        instaboost=InstaBoost(recipe.instaboost, recipe.instaboost_heatmap) if recipe.instaboost > 0 else None,
        copy_paste=CopyPaste.of(annotations, trained_images(annotations), recipe),
    )


def evaluation_dataset(
    annotations: Annotations, recipe: DataRecipe, *, resized: bool = True, within: tuple[int, int] | None = None
) -> DetectionDataset:
    """A whole split to detect in, with the recipe's test transform; not ``resized``, as the files are: for views.

    ``within`` is a height and a width that are not exceeded either.
    """
    transform = fit_transform(recipe.test_short_edge, recipe.long_edge, within) if resized else Compose(())
    return DetectionDataset(annotations, transform, drop_empty=False, with_objects=False)
