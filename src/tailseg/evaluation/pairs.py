"""Sets of pairs of an image and a category, in memory by their number: a matrix of all pairs can be gigabytes.

Shape letters: I images, K categories, P pairs, N questions.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from tailseg.data.annotations.columns import starts_of

Positions = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Pairs of an image and a category, both known by their position."""

    keys: Positions  # (P,) image * K + category, ascending, each once
    categories: int  # K
    whole: NDArray[np.bool_]  # (I,) images that are paired with every category, whatever ``keys`` has of them

    @staticmethod
    def of(images: Positions, categories: Positions, count: int, whole: NDArray[np.bool_]) -> Pairs:
        """The pairs of ``images`` (P,) and ``categories`` (P,) in any order, of ``count`` categories in all."""
        return Pairs(np.unique(images * count + categories), count, whole)

    def and_of(self, images: Positions, categories: Positions) -> Pairs:
        """These pairs and those of ``images`` (P,) and ``categories`` (P,)."""
        more = images * self.categories + categories
        return Pairs(np.union1d(self.keys, more), self.categories, self.whole)

    def has(self, images: Positions, categories: Positions) -> NDArray[np.bool_]:
        """(N,) whether each pair of ``images`` (N,) and ``categories`` (N,) is one of these."""
        found: NDArray[np.bool_] = self.whole[images]
        if self.keys.size:
            wanted = images * self.categories + categories
            places = np.searchsorted(self.keys, wanted).clip(max=self.keys.size - 1)
            found = found | (self.keys[places] == wanted)
        return found

    def lists(self) -> list[list[int]]:
        """The categories of each image that ``keys`` names; it does not look at ``whole``."""
        images, categories = np.divmod(self.keys, self.categories)
        starts = starts_of(np.bincount(images, minlength=len(self.whole))).tolist()
        flat = categories.tolist()
        return [flat[start:stop] for start, stop in pairwise(starts)]
