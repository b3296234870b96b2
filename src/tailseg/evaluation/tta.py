"""Test-time augmentation: what a detector finds in several views of one picture, averaged (report, section 2.2).

A view is the picture, mirrored or not, with its longer edge of some length. They are merged three times:

1. Each view proposes boxes. Laid back onto the picture they are pooled, and NMS leaves the best.
2. Those go into every view, through all stages. Final boxes and scores of each are averaged over the views; of the
   means the best are kept as ever.
3. What is kept goes into every view's mask heads. The masks' probabilities, and their IoU, are averaged.

The maps of a view are the bulk of the memory, so only one view's exist at a time: they are computed again for each of
the three rounds, in which nothing of a view outlives it but its proposals or its share of a sum. Every second round
goes through the views backwards and so begins with the maps that are there: V views take 3·V - 2 passes.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torchvision.ops import nms

from tailseg.data.batches import batch_of
from tailseg.data.transforms import Compose, HorizontalFlip, Image, ResizeLongestEdge
from tailseg.model.detector import EVERYTHING, Detector, Wanted
from tailseg.recipes.schema import Recipe
from tailseg.structures import Batch, RawDetections


@dataclass(frozen=True, slots=True)
class View:
    """One way to look at a picture."""

    long_edge: int  # pixels
    mirrored: bool

    @property
    def transform(self) -> Compose:
        """From the picture to the view: mirrored first, so that a mirrored picture has the same views, swapped."""
        resize = ResizeLongestEdge(self.long_edge, self.long_edge)
        return Compose((HorizontalFlip(1.0), resize) if self.mirrored else (resize,))


def view_edges(recipe: Recipe) -> tuple[int, ...]:
    """Longer edges of a recipe's views in pixels: `test.tta_long_edges`.

    By default as many times the longer edge that a picture of 4 to 3 is tested at as the report's 1200 to 2000 are of
    1280.
    """
    if recipe.test.tta_long_edges is not None:
        return recipe.test.tta_long_edges
    tested = min(recipe.data.test_short_edge * 4 / 3, recipe.data.long_edge)
    return tuple(max(round(tested * edge / 1280), 32) for edge in (1200, 1400, 1600, 1800, 2000))


def views_of(recipe: Recipe) -> tuple[View, ...]:
    """The views of a recipe; none if it asks for no test-time augmentation."""
    if not recipe.test.tta:
        return ()
    sides = (False, True) if recipe.test.tta_flip else (False,)
    return tuple(View(edge, mirrored) for edge in view_edges(recipe) for mirrored in sides)


@torch.no_grad()
def detect_views(
    detector: Detector, picture: Image, views: Sequence[View], wanted: Wanted = EVERYTHING
) -> RawDetections:
    """Detections in a picture, averaged over views of it.

    One plain view gives what `Detector.detect` gives for it: scores and masks to the bit, boxes to the rounding of
    their coordinates.

    Args:
        detector: in evaluation mode.
        picture: (H, W, 3) uint8 RGB, in full size.
        views: at least one.
        wanted: a choice among the detections.

    Returns:
        Detections on the detector's device, in pixels of the picture, best score first. The detector's `min_size`, if
        it has one, is in these pixels too.
    """
    cache = ViewCache(detector, picture, views)
    proposals = pooled(cache.each(ViewFeatures.proposals), detector.rpn.nms_iou, detector.rpn.post_nms[False])
    # The means of all boxes and classes get no name, under which they would wait for the last round to end.
    boxes, scores, labels, _ = detector.select_detections(
        *cache.mean(lambda seen: seen.predict_boxes(proposals)), wanted=wanted
    )
    masks, *ious = cache.mean(lambda seen: seen.masks(boxes, labels))
    return RawDetections(
        image_hw=(picture.shape[0], picture.shape[1]),
        boxes=boxes.float(),
        scores=scores,
        labels=labels,
        masks=masks,
        mask_scores=scores * ious[0] if ious else None,
    )


def pooled(proposals: Sequence[tuple[Tensor, Tensor]], iou: float, limit: int) -> Tensor:
    """The best boxes (K, 4) among those of all views, K <= ``limit``, best first.

    Args:
        proposals: boxes (P, 4) in pixels of the picture, and scores (P,), of each view.
        iou: boxes with more overlap than this with a better one are dropped, whatever their levels. A single view's
            proposals stay as they are: they have had their NMS.
        limit: most boxes.
    """
    boxes, scores = (torch.cat(parts) for parts in zip(*proposals, strict=True))
    if len(proposals) == 1:
        return boxes
    kept: Tensor = nms(boxes, scores.to(boxes.dtype), iou)
    return boxes[kept[:limit]]


class ViewFeatures:
    """A view with what the heads get to see of it, and what the detector says of boxes in it.

    Boxes come and go in pixels of the picture and in float64: there and back, coordinates are the same float32 as
    before, so that what is computed again is the same to the bit.

    Args:
        detector: in evaluation mode.
        batch: the view alone.
        mirrored: whether it is.
    """

    def __init__(self, detector: Detector, batch: Batch, mirrored: bool) -> None:
        self.detector = detector
        self.image_sizes, self.picture_hws = batch.image_sizes, batch.original_sizes  # (1, 2) each
        self.mirrored = mirrored
        self.features = detector.extract_features(batch)

    def proposals(self) -> tuple[Tensor, Tensor]:
        """The RPN's boxes (P, 4) and scores (P,), best first."""
        rpn = self.detector.rpn
        found = rpn.propose(rpn(self.features.pyramid), self.image_sizes, training=False)
        return self._onto_picture(found.boxes[found.valid]), found.scores[found.valid]

    def predict_boxes(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Refine and classify boxes (K, 4) in all stages: boxes (K, 1 or C, 4) and scores (K, C)."""
        decoded, scores = self.detector.predict_boxes(self.features, self._rois(boxes), self.image_sizes)
        return self._onto_picture(decoded), scores

    def masks(self, boxes: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Probabilities (n, 28, 28) over boxes (n, 4) of classes (n,), and if the detector judges masks, IoU (n,)."""
        masks, ious = self.detector.predict_masks(self.features, self._rois(boxes), labels)
        masks = masks.flip(-1) if self.mirrored else masks
        return (masks,) if ious is None else (masks, ious)

    def _rois(self, boxes: Tensor) -> Tensor:
        """Boxes (K, 4) of the picture as RoIs (K, 5) float32 in the view."""
        inside = boxes * _sides(self.image_sizes) / _sides(self.picture_hws)
        if self.mirrored:
            self._mirror(inside)
        return torch.cat([inside.new_zeros(len(inside), 1), inside], dim=1).float()

    def _onto_picture(self, boxes: Tensor) -> Tensor:
        """Boxes (..., 4) of the view in float64 pixels of the picture; what was inside is inside."""
        boxes = boxes.to(torch.float64, copy=True)
        if self.mirrored:
            self._mirror(boxes)
        # Not by their quotient: it would be rounded, and a box at the edge would come back a little off it.
        boxes *= _sides(self.picture_hws)
        boxes /= _sides(self.image_sizes)
        return boxes

    def _mirror(self, boxes: Tensor) -> None:
        """Exchange left and right of boxes (..., 4) of the view, in place; the padding is no part of it."""
        boxes[..., 0::2] = self.image_sizes[0, 1] - boxes[..., [2, 0]]


def _sides(hws: Tensor) -> Tensor:
    """(4,): width, height, width, height of a size (1, 2)."""
    return hws.flip(1).repeat(1, 2)[0]


class ViewCache:
    """Rounds through the views of a picture, each beginning with the view that the last one ended with.

    Args:
        detector, picture, views: of `detect_views`.
    """

    def __init__(self, detector: Detector, picture: Image, views: Sequence[View]) -> None:
        self.detector, self.picture = detector, picture
        # The largest first: in memory that was theirs, others find room.
        self.order = sorted(views, key=lambda view: -view.long_edge)
        self.at: View | None = None
        self.seen: ViewFeatures | None = None

    def each(self, ask: Callable[[ViewFeatures], tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Call ``ask`` for every view; returns its results."""
        return [ask(self._go_to(view)) for view in self._round()]

    def mean(self, ask: Callable[[ViewFeatures], tuple[Tensor, ...]]) -> list[Tensor]:
        """The means over the views of the tensors that ``ask`` gives."""
        sums: list[Tensor] = []
        for view in self._round():
            self._add(sums, ask(self._go_to(view)))
        for total in sums:
            total /= len(self.order)
        return sums

    @staticmethod
    def _add(sums: list[Tensor], parts: Sequence[Tensor]) -> None:
        # A function of its own: a loop would keep the last view's parts while the next view's maps are computed.
        if not sums:
            sums.extend(parts)
            return
        for total, part in zip(sums, parts, strict=True):
            total += part

    def _round(self) -> list[View]:
        order = list(self.order)
        self.order.reverse()
        return order

    def _go_to(self, view: View) -> ViewFeatures:
        """The view's maps, computed unless they are there."""
        if self.seen is None or view is not self.at:
            self.seen = None  # before there are others
            device = self.detector.pixel_mean.device
            if device.type == "cpu":
                _return_freed_memory()
            batch = batch_of(self.picture, view.transform, self.detector.divisor)
            self.seen = ViewFeatures(self.detector, batch.to(device), view.mirrored)
            self.at = view
        return self.seen


def _return_freed_memory() -> None:
    """Give memory that was freed back to the system, where the C library is one that keeps it (glibc).

    What a view leaves in the heap does not fit the maps of a view of another size, so the process would grow to one and
    a half times what it ever uses. A call takes some hundredths of a second, a hundredth of a pass.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
