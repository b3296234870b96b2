"""Matches that can be counted by hand."""

import numpy as np

from tailseg.evaluation.matches import Matches


def matches_by_hand():
    """Image 0 has three objects of class 0, of which two are found, image 1 one of class 2, found; image 2 none."""
    return Matches(
        rows=np.arange(5),
        image=np.array([0, 0, 0, 1, 2]),
        category=np.array([0, 0, 0, 2, 2]),
        scores=np.array([0.9, 0.8, 0.3, 0.7, 0.2]),
        right=np.array([True, False, True, True, False]),
        object_image=np.array([0, 0, 0, 1]),
        object_category=np.array([0, 0, 0, 2]),
        object_area=np.array([15.0**2, 16.0**2, 40.0**2, 500.0**2]),
        found_with=np.array([0.9, 0.3, -np.inf, 0.7]),
    )
