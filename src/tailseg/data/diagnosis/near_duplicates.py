"""Pairs of images that look nearly the same: copied, scaled, compressed again, or taken a moment later.

Two tests on thumbnails must agree. A difference hash (dHash) of 64 bits compares neighbouring brightness: pairs whose
hashes differ in at most `BITS` bits are candidates. The correlation of their thumbnails must then reach `ALIKE`.
Measured on 128 photographs of COCO: of 292,608 pairs of different photographs and parts of them, none passes (27 pass
the first test, the best of which correlates at 0.76). Of copies that were halved, compressed to JPEG quality 30,
darkened to 0.6 or given noise of 10 levels, all pass; brightened by 1.3 or cut by 1 % at each edge, 98 %; cut by 2.5 %,
67 %.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from tailseg.data.images import Pixels

Thumbnail = NDArray[np.float32]  # (HEIGHT, WIDTH) mean brightness

HEIGHT, WIDTH = 16, 18  # of a thumbnail; 2 x 2 of its pixels make one of the 8 x 9 that are hashed
SAMPLES = 8  # of the image's pixels that are looked at along each side of one of a thumbnail's, at least
BITS = 10  # of 64
ALIKE = 0.95  # correlation
BLOCK = 512  # images that are compared with all others at once


def thumbnail_of(pixels: Pixels) -> Thumbnail:
    """The mean brightness of an image (H, W, 3) in a grid of 16 x 18 cells; large ones are looked at in steps."""
    height, width = pixels.shape[:2]
    step = max(min(height, width) // (SAMPLES * HEIGHT), 1)
    if step > 1:
        pixels = cv2.resize(pixels, (width // step, height // step), interpolation=cv2.INTER_NEAREST)
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    return np.asarray(cv2.resize(grey, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA), np.float32)


def dhash(thumbnails: NDArray[np.float32]) -> NDArray[np.uint64]:
    """(N,) hashes of thumbnails (N, 16, 18): a bit is 1 where a cell of the 8 x 9 is brighter than its left one."""
    cells = thumbnails.reshape(-1, HEIGHT // 2, 2, WIDTH // 2, 2).mean(axis=(2, 4))
    bits = (cells[:, :, 1:] > cells[:, :, :-1]).reshape(len(cells), 64)
    return np.packbits(bits, axis=1).view(np.uint64)[:, 0]


def nearest_alike(
    images: NDArray[np.float32], others: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each image that looks like one of the others, the one that it is most like.

    Args:
        images: (N, 16, 18) thumbnails.
        others: (M, 16, 18) thumbnails.

    Returns:
        (P,) positions of images, ascending, and (P,) those of the others. An image of one colour is like none.
    """
    hashes, other_hashes = dhash(images), dhash(others)
    vectors, other_vectors = _normalised(images), _normalised(others)
    rows, columns = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for start in range(0, len(images) if len(others) else 0, BLOCK):
        block = slice(start, start + BLOCK)
        near = np.bitwise_count(hashes[block, None] ^ other_hashes) <= BITS
        likeness = np.where(near, vectors[block] @ other_vectors.T, 0)
        nearest = likeness.argmax(axis=1)
        found = np.flatnonzero(likeness[np.arange(len(nearest)), nearest] >= ALIKE)
        rows.append(start + found)
        columns.append(nearest[found])
    return np.concatenate(rows), np.concatenate(columns)


def _normalised(thumbnails: NDArray[np.float32]) -> NDArray[np.float32]:
    """Thumbnails as vectors (N, 288) of mean 0 and length 1, or 0 for one colour: their products are correlations."""
    vectors = thumbnails.reshape(len(thumbnails), HEIGHT * WIDTH)
    vectors = vectors - vectors.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.where(lengths > 0.1, vectors / np.maximum(lengths, 0.1), 0)
