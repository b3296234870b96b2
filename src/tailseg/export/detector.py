"""A detector as one function of tensors, from a picture to its objects, that `torch.export` can trace."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tailseg.model.detector import Detector
from tailseg.model.traceable import keep_within_classes

MOST_PAIRS = 4096  # (box, class) pairs that go into the last NMS


class ExportedDetector(nn.Module):
    """Detections of one picture, with what the detector was built with: thresholds and limits.

    `Detector.detect` lengthens the list of pairs that go into the last NMS until enough of them survive it; here the
    `MOST_PAIRS` best are all. A picture in which they leave fewer objects than the limit can get fewer.
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, image: Tensor, image_size: Tensor) -> tuple[Tensor, ...]:
        """Boxes (n, 4) in pixels of the input, scores (n,), labels (n,) int64, masks (n, 28, 28), best score first.

        With a mask-IoU head the scores (n,) that rank masks follow.

        Args:
            image: (3, H, W) uint8 RGB, padded right and bottom.
            image_size: (2,) int64, height and width without the padding.
        """
        detector, sizes = self.detector, image_size.unsqueeze(0)
        features = detector.image_features(image.unsqueeze(0), sizes)
        proposals = detector.rpn.propose(detector.rpn(features.pyramid), sizes, training=False)
        boxes, valid = proposals.boxes[0], proposals.valid[0]
        decoded, scores = detector.predict_boxes(features, _rois(boxes), sizes)
        boxes, scores, labels = self._select(decoded, torch.where(valid.unsqueeze(1), scores, -1.0))
        # One RoI more, the whole image: neither tracing nor every runtime bears a batch of none.
        whole = torch.cat([torch.zeros_like(sizes), sizes.flip(1)], dim=1).to(boxes)
        rois, count = _rois(torch.cat([boxes, whole])), boxes.shape[0]
        masks, ious = detector.predict_masks(features, rois, F.pad(labels, (0, 1)))
        found = (boxes, scores, labels, masks[:count])
        return found if ious is None else (*found, scores * ious[:count])

    def _select(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        detector, num_classes = self.detector, scores.shape[1]
        if detector.min_size is not None:
            large = ((boxes[..., 2:] - boxes[..., :2]) > detector.min_size).all(dim=2)
            scores = torch.where(large, scores, -1.0)
        flat = scores.flatten()
        top, pair = flat.topk(min(MOST_PAIRS, flat.shape[0]))
        rows, labels = pair // num_classes, pair % num_classes
        pair_boxes = boxes[rows, labels if boxes.shape[1] > 1 else torch.zeros_like(labels)]
        candidates = torch.where(top > detector.score_threshold, top, 0.0)
        kept = keep_within_classes(pair_boxes, candidates, labels, num_classes, detector.nms_iou)
        best, place = torch.where(kept, candidates, 0.0).topk(min(detector.max_detections, candidates.shape[0]))
        place = place[(best > 0).nonzero().squeeze(1)]
        return pair_boxes[place], top[place], labels[place]


def _rois(boxes: Tensor) -> Tensor:
    """Boxes (K, 4) of the one image as RoIs (K, 5)."""
    return torch.cat([torch.zeros_like(boxes[:, :1]), boxes], dim=1)
