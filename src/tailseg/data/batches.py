"""Samples joined to batches."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from tailseg.data.transforms import Compose, Image
from tailseg.structures import IGNORED_CELL, Batch, Instances, Sample

FEW_SHAPES_DIVISOR = 128  # pixels
FEW_SHAPES_ROWS, FEW_SHAPES_FACTOR = 32, 4


def collate(samples: list[Sample], divisor: int = 32, *, few_shapes: bool = False) -> Batch:
    """One batch of at least one sample.

    Images are padded right and bottom with 0 to the largest height and width, rounded up to multiples of
    ``divisor``. Objects are padded with zero rows to those of the fullest image, at least one row.

    With ``few_shapes`` a data set makes batches of few shapes: sides are multiples of 128, too, and rows of objects 32,
    128, 512 and so on.
    """
    if few_shapes:
        divisor = coarser(divisor)
    hws = [(int(s.image.shape[1]), int(s.image.shape[2])) for s in samples]
    height, width = (-(-max(side) // divisor) * divisor for side in zip(*hws, strict=True))
    images = torch.zeros((len(samples), 3, height, width), dtype=torch.uint8)
    for image, sample, (h, w) in zip(images, samples, hws, strict=True):
        image[:, :h, :w] = sample.image
    rows = max(1, *(len(s.instances) for s in samples))
    rows = rounded_rows(rows) if few_shapes else rows
    valid = torch.zeros((len(samples), rows), dtype=torch.bool)
    for flags, sample in zip(valid, samples, strict=True):
        flags[: len(sample.instances)] = True
    return Batch(
        images=images,
        image_sizes=torch.tensor(hws),
        original_sizes=torch.tensor([s.original_hw for s in samples]),
        image_ids=torch.tensor([s.image_id for s in samples]),
        boxes=_padded([s.instances.boxes for s in samples], rows),
        labels=_padded([s.instances.labels for s in samples], rows),
        valid=valid,
        masks=_padded([s.instances.masks for s in samples], rows),
        mask_frames=_padded([s.instances.mask_frames for s in samples], rows),
        absent=torch.stack([s.absent for s in samples]),
        ignored=_ignored([s.ignored for s in samples], (height, width)),
    )


def coarser(divisor: int) -> int:
    """Multiple of a divisor that sides are padded to where shapes shall be few, in pixels."""
    return math.lcm(divisor, FEW_SHAPES_DIVISOR)


def rounded_rows(rows: int) -> int:
    """Rows of objects where shapes shall be few: 32, 128, 512, ..."""
    rounded = FEW_SHAPES_ROWS
    while rounded < rows:
        rounded *= FEW_SHAPES_FACTOR
    return rounded


def _ignored(parts: list[Tensor], image_hw: tuple[int, int]) -> Tensor:
    """(B, H / 4, W / 4) uint8 of the maps of the images, some of which may have none; (B, 0, 0) if all have none."""
    if all(part.numel() == 0 for part in parts):
        return torch.zeros((len(parts), 0, 0), dtype=torch.uint8)
    maps = torch.zeros((len(parts), *(-(-side // IGNORED_CELL) for side in image_hw)), dtype=torch.uint8)
    for target, part in zip(maps, parts, strict=True):
        target[: part.shape[0], : part.shape[1]] = part
    return maps


def _padded(parts: list[Tensor], rows: int) -> Tensor:
    """(N_i, ...) for each image -> (B, rows, ...), zero beyond N_i."""
    padded = parts[0].new_zeros((len(parts), rows, *parts[0].shape[1:]))
    for target, part in zip(padded, parts, strict=True):
        target[: len(part)] = part
    return padded


def batch_of(picture: Image, transform: Compose, divisor: int) -> Batch:
    """One picture (H, W, 3) uint8 RGB as a batch, without objects, after a transform in which nothing is chance.

    Args:
        picture: of at least one pixel.
        transform: applied to it.
        divisor: the batch is padded to multiples of this.
    """
    nothing = Instances(
        boxes=torch.zeros(0, 4),
        labels=torch.zeros(0, dtype=torch.int64),
        masks=torch.zeros(0, 1, 1, dtype=torch.uint8),
        mask_frames=torch.zeros(0, 4),
    )
    pixels, instances = transform(picture, nothing, np.random.default_rng(0))
    sample = Sample(
        image=torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))),
        instances=instances,
        absent=torch.zeros(0, dtype=torch.bool),
        image_id=0,
        original_hw=(picture.shape[0], picture.shape[1]),
    )
    return collate([sample], divisor)
