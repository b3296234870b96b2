"""Records that flow between the stages: one dataclass each for ground truth, sample, batch and detections.

Boxes are float32 xyxy pixels of the image at hand, without the +1 convention; sizes are (height, width);
labels are 0..C-1 with background = C. Shape letters: N objects, B images, G most objects of an image in the
batch, S side of a stored mask, C classes, H and W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

IGNORED_CELL = 4  # pixels: side of a cell in a map of regions to be ignored


def _require_same_rows(**tensors: Tensor) -> None:
    """Raise ValueError unless all tensors have the same length."""
    rows = {name: tensor.shape[0] for name, tensor in tensors.items()}
    if len(set(rows.values())) > 1:
        raise ValueError(f"expected the same number of rows everywhere, received {rows}")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)  # eq: tensors have no single answer to ==
class Instances:
    """The annotated objects of one image.

    A mask is an S x S grid of coverage laid over a rectangle of the image, its frame. The grid keeps the
    annotation's own resolution (objects larger than the grid are area-averaged into it), so resizing, flipping
    and cropping an image move frames and never resample a mask, and no full-size bitmap exists anywhere. The
    outermost ring of the grid is a margin: zero, or the mask repeated where the object touches the image's edge.
    """

    boxes: Tensor  # (N, 4) float32, xyxy in pixels
    labels: Tensor  # (N,) int64 in [0, C)
    masks: Tensor  # (N, S, S) uint8, 255 = covered
    mask_frames: Tensor  # (N, 4) float32, xyxy in pixels: the rectangle that the whole grid covers

    __iter__ = None  # or Python would try self[0], self[1], ... and take the first IndexError for the end

    def __post_init__(self) -> None:
        _require_same_rows(boxes=self.boxes, labels=self.labels, masks=self.masks, mask_frames=self.mask_frames)

    def __len__(self) -> int:
        return self.labels.shape[0]

    def __getitem__(self, index: Tensor) -> Instances:
        """The objects at ``index`` (bool mask or int64 positions)."""
        return Instances(
            boxes=self.boxes[index],
            labels=self.labels[index],
            masks=self.masks[index],
            mask_frames=self.mask_frames[index],
        )


def joined(one: Instances, other: Instances) -> Instances:
    """The objects of both, in this order; their grids have one size."""
    return Instances(**{f.name: torch.cat([getattr(one, f.name), getattr(other, f.name)]) for f in fields(Instances)})


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sample:
    """One image on its way to a batch."""

    image: Tensor  # (3, H, W) uint8 RGB
    instances: Instances
    absent: Tensor  # (C,) bool: classes verified to be in no part of the image
    image_id: int
    original_hw: tuple[int, int]  # pixels, before any transform
    ignored: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.uint8))
    """(H / 4, W / 4, rounded up) uint8: 1 in regions that are neither object nor background; (0, 0) without any."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """Samples of a step, padded right and bottom to one size; ground truth is padded to G rows."""

    images: Tensor  # (B, 3, H, W) uint8 RGB, 0 in the padding
    image_sizes: Tensor  # (B, 2) int64, sizes before padding
    original_sizes: Tensor  # (B, 2) int64, sizes of the image files
    image_ids: Tensor  # (B,) int64
    boxes: Tensor  # (B, G, 4) float32
    labels: Tensor  # (B, G) int64
    valid: Tensor  # (B, G) bool, False in the padding
    masks: Tensor  # (B, G, S, S) uint8
    mask_frames: Tensor  # (B, G, 4) float32
    absent: Tensor  # (B, C) bool: classes verified to be in no part of the image
    ignored: Tensor  # (B, H / 4, W / 4) uint8: 1 where there is neither object nor background; (B, 0, 0) without any

    def __len__(self) -> int:
        return self.images.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``; from pinned memory the copies do not wait."""
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)}
        return replace(self, **moved)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (called by the data loader)."""
        return replace(self, **{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Proposals:
    """Class-agnostic boxes of a batch, best first; P slots an image."""

    boxes: Tensor  # (B, P, 4) float32, clipped to the image
    scores: Tensor  # (B, P) objectness in [0, 1]
    valid: Tensor  # (B, P) bool, False where NMS left fewer than P


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RawDetections:
    """Detections of one image as the detector returns them, best score first.

    Users meet them as `tailseg.results.detections.Detections`.
    """

    image_hw: tuple[int, int]  # pixels, of the image that the boxes refer to
    boxes: Tensor  # (N, 4) float32, xyxy in pixels
    scores: Tensor  # (N,) float32 in [0, 1]
    labels: Tensor  # (N,) int64 in [0, C)
    masks: Tensor  # (N, M, M) float32 in [0, 1]: probabilities on a grid over the box
    mask_scores: Tensor | None = None  # (N,) float32 in [0, 1]: scores that rank masks; None: use `scores`

    __iter__ = None  # as in `Instances`

    def __post_init__(self) -> None:
        own = {} if self.mask_scores is None else {"mask_scores": self.mask_scores}
        _require_same_rows(boxes=self.boxes, scores=self.scores, labels=self.labels, masks=self.masks, **own)

    def __len__(self) -> int:
        return self.labels.shape[0]

    def __getitem__(self, index: Tensor) -> RawDetections:
        """The detections at ``index`` (bool mask or int64 positions)."""
        return replace(
            self,
            boxes=self.boxes[index],
            scores=self.scores[index],
            labels=self.labels[index],
            masks=self.masks[index],
            mask_scores=None if self.mask_scores is None else self.mask_scores[index],
        )

    def to(self, device: torch.device | str) -> RawDetections:
        """The same detections on ``device``."""
        return replace(
            self,
            boxes=self.boxes.to(device),
            scores=self.scores.to(device),
            labels=self.labels.to(device),
            masks=self.masks.to(device),
            mask_scores=None if self.mask_scores is None else self.mask_scores.to(device),
        )
