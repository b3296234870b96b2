"""Matching of priors (anchors or proposals) to objects, and sampling among them.

Everything is batched over the images of a step and has sizes known in advance, so nothing waits for the device.
Shape letters: B images, N priors an image, G padded objects an image, S sampled slots an image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tailseg.model.boxes import pairwise_iou

NEGATIVE = -1
IGNORED = -2
OBJECTS_AT_ONCE = 64  # bounds the (B, N, G) overlap matrix on images with hundreds of objects


@dataclass(frozen=True, kw_only=True, slots=True)
class Matcher:
    """Thresholds of the assignment by overlap.

    A prior is positive with an IoU of at least ``positive_iou``, negative below ``negative_iou``, ignored between.
    With ``low_quality_iou`` every object whose best IoU reaches it also takes all priors with that best IoU, later
    objects over earlier ones.
    """

    positive_iou: float
    negative_iou: float
    low_quality_iou: float | None = None

    def __call__(self, priors: Tensor, usable: Tensor, objects: Tensor, valid: Tensor) -> Tensor:
        """Assign an object to every prior.

        Args:
            priors: (B, N, 4) or (1, N, 4), the same for all images.
            usable: (B, N) bool; the others are ignored and take part in nothing.
            objects: (B, G, 4) padded ground-truth boxes.
            valid: (B, G) bool, False in the padding.

        Returns:
            (B, N) int64: index of the object, `NEGATIVE` or `IGNORED`.
        """
        best = priors.new_full(usable.shape, -1.0)
        matched = torch.full(usable.shape, NEGATIVE, device=priors.device)
        forced = torch.full_like(matched, NEGATIVE)
        if matched.numel() == 0:
            return matched
        for start in range(0, objects.shape[1], OBJECTS_AT_ONCE):
            stop = start + OBJECTS_AT_ONCE
            iou = pairwise_iou(priors, objects[:, start:stop])
            iou = iou.masked_fill(~(usable.unsqueeze(2) & valid[:, None, start:stop]), -1.0)
            chunk_best, chunk_object = iou.max(dim=2)
            better = chunk_best > best
            best = torch.where(better, chunk_best, best)
            matched = torch.where(better, chunk_object + start, matched)
            if self.low_quality_iou is not None:
                forced = torch.maximum(forced, self._forced(iou, self.low_quality_iou, start))
        positive = best >= self.positive_iou
        negative = best < self.negative_iou  # includes priors of images without objects (-1)
        matched = torch.where(positive, matched, torch.where(negative, NEGATIVE, IGNORED))
        matched = torch.where(forced >= 0, forced, matched)
        return torch.where(usable, matched, IGNORED)

    @staticmethod
    def _forced(iou: Tensor, floor: float, start: int) -> Tensor:
        """(B, N): the last object of the chunk for which a prior is among the best, or `NEGATIVE`."""
        best_of_object = iou.amax(dim=1, keepdim=True)
        takes = (iou == best_of_object) & (best_of_object >= floor)
        index = torch.arange(start, start + iou.shape[2], device=iou.device)
        return torch.where(takes, index, NEGATIVE).amax(dim=2)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sampled:
    """A fixed number S of priors an image: positives first, then negatives, then unused rows."""

    index: Tensor  # (B, S) int64, position among the priors
    matched: Tensor  # (B, S) int64, the object of a positive, 0 elsewhere
    positive: Tensor  # (B, S) bool
    valid: Tensor  # (B, S) bool: positive or negative; False where priors ran out


def sample(matched: Tensor, num_samples: int, max_positive: int) -> Sampled:
    """Draw up to ``num_samples`` priors an image uniformly, at most ``max_positive`` of them positive.

    Args:
        matched: (B, N) from `Matcher`.
        num_samples: S.
        max_positive: most positives; what they leave is filled with negatives.
    """
    num_samples = min(num_samples, matched.shape[1])
    is_positive, is_negative = matched >= 0, matched == NEGATIVE
    lottery = torch.rand(matched.shape, device=matched.device)
    keys = torch.where(is_positive, lottery, -1.0)
    drawn, winners = keys.topk(min(max_positive, matched.shape[1]), dim=1)
    # Winners rank above all negatives, other positives and ignored priors below; topk then lays them out in order.
    priority = torch.where(is_negative, lottery, -1.0).scatter(1, winners, torch.where(drawn >= 0, 2 + drawn, -1.0))
    # A slot won by a key of -1 is not a positive: give negatives among such winners their lottery ticket back.
    priority = torch.where(is_negative, lottery, priority)
    rank, index = priority.topk(num_samples, dim=1)
    positive = rank >= 2
    own = torch.where(positive, matched.gather(1, index), 0)
    return Sampled(index=index, matched=own, positive=positive, valid=rank >= 0)
