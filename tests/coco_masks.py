"""Polygons, and the bitmaps that COCO's own tools make of them."""

import numpy as np
from hypothesis import strategies as st
from pycocotools import mask as coco


def full_bitmap(polygons, image_hw):
    """The definition: COCO's own rasteriser on the whole image."""
    codes = coco.frPyObjects([np.asarray(p, np.float64).tolist() for p in polygons], *image_hw)
    return coco.decode(codes).max(axis=2)


coordinate = st.integers(-1500, 11500).map(lambda n: n / 100)
polygon = st.lists(st.tuples(coordinate, coordinate), min_size=3, max_size=8).map(
    lambda points: np.array(points, np.float64).ravel()
)
