"""Regions of an image that are neither object nor background (crowds, ``"ignore"``), as a map of cells."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor

from tailseg.structures import IGNORED_CELL, Instances


def painted(regions: Instances, image_hw: tuple[int, int]) -> Tensor:
    """The union of some regions' masks on cells of `IGNORED_CELL` pixels.

    Args:
        regions: with their frames in pixels of the image; labels do not matter.
        image_hw: size of the image in pixels.

    Returns:
        (H / 4, W / 4) uint8, rounded up: 1 where at least half of a cell's middle is covered.
    """
    height, width = (-(-side // IGNORED_CELL) for side in image_hw)
    union = np.zeros((height, width), np.uint8)
    for mask, frame in zip(regions.masks.numpy(), regions.mask_frames.numpy().astype(np.float64), strict=True):
        side = mask.shape[0]
        scale = (frame[2:] - frame[:2]) / (side * IGNORED_CELL)  # cells of the map, of one of the grid
        # Pixel i of OpenCV's images has its middle at i, a cell at i + 1/2.
        shift = frame[:2] / IGNORED_CELL + 0.5 * scale - 0.5
        matrix = np.array([[scale[0], 0, shift[0]], [0, scale[1], shift[1]]])
        covered = cv2.warpAffine(mask, matrix, (width, height), flags=cv2.INTER_LINEAR)
        union |= (covered >= 128).astype(np.uint8)
    return torch.from_numpy(union)
