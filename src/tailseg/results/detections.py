"""The results object: the objects that a model found in one picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tailseg.data.annotations.annotations import Category
from tailseg.data.images import read_image
from tailseg.errors import UserError
from tailseg.results.indexing import positions
from tailseg.structures import RawDetections

Picture = NDArray[np.uint8]  # (H, W, 3) RGB


class Detections:
    """The objects found in one picture, best score first; N objects, H x W pixels.

    It behaves like a list: ``len(found)``, ``for one in found``, ``found[0]``, ``found[-3:]`` and
    ``found[found.scores > 0.5]``; each part is a `Detections` of fewer objects, and one object is a `Detections` of
    one. All tensors lie on the CPU. A mask is kept as a small grid over its box, so the object itself is small;
    what is as large as the picture is made when asked for.

    Args:
        raw: the objects as the detector returns them, in pixels of the picture.
        categories: category of each label.
        picture: (H, W, 3) uint8 RGB; or the path of its file, which is read again when the pixels are needed, so
            that many results need little memory; or None where neither is at hand.
        source: name of the picture in messages and results; None takes the path of ``picture``, if it is one.

    Raises:
        ValueError: a picture of another size than the detections.
    """

    def __init__(
        self,
        raw: RawDetections,
        categories: Sequence[Category],
        picture: Picture | Path | None = None,
        source: str | None = None,
    ) -> None:
        if isinstance(picture, np.ndarray) and picture.shape[:2] != tuple(raw.image_hw):
            raise ValueError(f"expected a picture of {raw.image_hw} pixels, received {picture.shape[:2]}")
        self.raw = raw.to("cpu")
        self.categories = tuple(categories)
        self.source = str(picture) if source is None and isinstance(picture, Path) else source
        self._picture = picture

    def __len__(self) -> int:
        return len(self.raw)

    def __iter__(self) -> Iterator[Detections]:
        """Yield one object at a time, each a `Detections` of one."""
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Any) -> Detections:
        """Select objects; the order is that of the index.

        Args:
            index: integer, slice, or one-dimensional list, array or tensor of integers or of N bools.

        Raises:
            IndexError: an integer is out of range, or there are not N bools.
            TypeError: the index is of another kind.
        """
        part = self.raw[positions(index, len(self))]
        return Detections(part, self.categories, self._picture, self.source)

    def __repr__(self) -> str:
        counts = Counter(self.names).most_common()
        found = ", ".join(f"{count} {name}" for name, count in counts) or "no objects"
        height, width = self.image_hw
        where = "" if self.source is None else f" in {self.source}"
        return f"<Detections{where} ({height} x {width} pixels): {found}>"

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width of the picture in pixels."""
        return self.raw.image_hw

    @property
    def boxes(self) -> Tensor:
        """(N, 4) float32, xyxy in pixels."""
        return self.raw.boxes

    @property
    def scores(self) -> Tensor:
        """(N,) float32 in [0, 1]."""
        return self.raw.scores

    @property
    def mask_scores(self) -> Tensor | None:
        """(N,) float32 in [0, 1]: scores that rank masks; None for models without a mask-IoU head, use `scores`."""
        return self.raw.mask_scores

    @property
    def labels(self) -> Tensor:
        """(N,) int64 in [0, C), positions in `categories`."""
        return self.raw.labels

    @property
    def names(self) -> list[str]:
        """Category name of each object."""
        return [self.categories[label].name for label in self.labels.tolist()]

    @property
    def category_ids(self) -> list[int]:
        """Category id of each object, as in the annotation file that the model was trained on."""
        return [self.categories[label].id for label in self.labels.tolist()]

    @property
    def picture(self) -> Picture:
        """(H, W, 3) uint8 RGB; read from its file again if it has one.

        Raises:
            UserError: the file is gone or now holds a picture of another size, or there is none.
        """
        if self._picture is None:
            raise UserError("these detections came without their picture: predict from a file or an array")
        if isinstance(self._picture, np.ndarray):
            return self._picture
        pixels = read_image(self._picture)
        if pixels.shape[:2] != tuple(self.image_hw):
            (height, width), (h, w) = self.image_hw, pixels.shape[:2]
            raise UserError(
                f"{self._picture}: has {h} x {w} pixels, but {height} x {width} when its objects were found; "
                "predict again"
            )
        return pixels
