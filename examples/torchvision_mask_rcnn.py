"""Seesaw Loss and the normalised classifier in torchvision's Mask R-CNN, put in from outside.

    pip install tailseg && python examples/torchvision_mask_rcnn.py FOLDER

torchvision labels background 0 and the classes 1..C; the losses label the classes 0..C-1 and background C.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from hotcoco import mask as rle
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, maskrcnn_resnet50_fpn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads

from tailseg import NormalizedLinear, UserError
from tailseg.data.dataset import DetectionDataset
from tailseg.data.sources import open_splits
from tailseg.data.transforms import fit_transform
from tailseg.layers.paste import encode_masks
from tailseg.losses import SeesawClassification

SIZES = {"min_size": 160, "max_size": 256, "box_batch_size_per_image": 128}  # pixels, pixels, RoIs: for a CPU
IMAGES, BATCH, PASSES = 8, 2, 6


class SeesawPredictor(nn.Module):
    """In place of torchvision's predictor: a normalised classifier of C classes and objectness; its box regressor."""

    def __init__(self, replaced: FastRCNNPredictor, num_classes: int) -> None:
        super().__init__()
        self.classification = SeesawClassification(num_classes, p=0.8, q=0.0)
        self.cls_score = NormalizedLinear(replaced.cls_score.in_features, self.classification.num_logits)
        self.bbox_pred = replaced.bbox_pred
        self.logits: Tensor | None = None  # of the step's RoIs, for the loss

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logs of the scores (R, 1 + C), background first, and box deltas (R, 4 + 4C)."""
        self.logits = logits = self.cls_score(features)
        scores = self.classification.scores(logits)  # (R, C + 1), background last; a row sums to 1, ...
        return scores.roll(1, dims=1).log(), self.bbox_pred(features)  # ... so the softmax of its logs is the row


class SeesawRoIHeads(RoIHeads):  # type: ignore[misc]  # torchvision has no types
    """torchvision's RoI heads with Seesaw Loss and objectness in place of cross-entropy."""

    labels: Tensor | None

    def select_training_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As in torchvision; the labels of the chosen RoIs are kept for the loss."""
        chosen = super().select_training_samples(*args, **kwargs)
        self.labels = torch.cat(chosen[2])
        return chosen

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As in torchvision, but for the classification loss."""
        detections, losses = super().forward(*args, **kwargs)
        if self.training:
            assert self.labels is not None
            del losses["loss_classifier"]
            classification = self.box_predictor.classification
            labels = torch.where(self.labels == 0, classification.num_classes, self.labels - 1)
            ours = classification.loss(self.box_predictor.logits, labels, torch.ones_like(labels, dtype=torch.bool))
            # The "roi" keeps loss_objectness free: the proposal network's loss has that name.
            losses |= {f"loss_roi_{name}": loss for name, loss in ours.items()}
            self.labels = self.box_predictor.logits = None  # the graph is not to outlive its step
        return detections, losses


def use_seesaw(model: MaskRCNN, num_classes: int) -> MaskRCNN:
    """Change the classifier and its loss in a ``model`` that torchvision made for 1 + num_classes classes."""
    model.roi_heads.box_predictor = SeesawPredictor(model.roi_heads.box_predictor, num_classes)
    model.roi_heads.__class__ = SeesawRoIHeads  # it overrides two methods; settings and weights stay as they are
    return model


def read(folder: Path, images: int) -> tuple[int, list[tuple[Tensor, dict[str, Tensor]]]]:
    """The number of classes, and the first training images (3, H, W) with torchvision's targets."""
    annotations = open_splits(folder, need=("train",)).train
    assert annotations is not None
    dataset = DetectionDataset(annotations, fit_transform(SIZES["min_size"], SIZES["max_size"]), drop_empty=True)
    pairs = []
    for sample in (dataset[index] for index in range(min(images, len(dataset)))):
        found, (height, width) = sample.instances, sample.image.shape[1:]
        codes = encode_masks(found.masks / 255, found.mask_frames, (height, width))
        masks = rle.decode(codes).transpose(2, 0, 1)  # (N, H, W)
        target = {"boxes": found.boxes, "labels": found.labels + 1, "masks": torch.from_numpy(masks.copy())}
        pairs.append((sample.image / 255, target))
    return len(annotations.categories), pairs


def train(model: MaskRCNN, pairs: list[tuple[Tensor, dict[str, Tensor]]], passes: int) -> None:
    """Train with AdamW and print the mean of each loss in each pass over the images."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4)
    for number in range(1, passes + 1):
        means: Counter[str] = Counter()
        for batch in (pairs[start : start + BATCH] for start in range(0, len(pairs), BATCH)):
            losses = model(*map(list, zip(*batch, strict=True)))
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            means.update({name: loss.item() * len(batch) / len(pairs) for name, loss in losses.items()})
        print(f"pass {number}: total {means.total():.3f},", ", ".join(f"{n} {mean:.3f}" for n, mean in means.items()))


def main(arguments: list[str] | None = None) -> None:
    """Train on a few images."""
    parser = argparse.ArgumentParser(description="Train torchvision's Mask R-CNN with Seesaw Loss on a few images.")
    parser.add_argument("folder", type=Path, help="folder with train.json (LVIS or COCO format) and images/")
    try:
        num_classes, pairs = read(parser.parse_args(arguments).folder, IMAGES)
    except UserError as error:
        sys.exit(str(error))
    torch.manual_seed(0)
    model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=1 + num_classes, **SIZES)
    train(use_seesaw(model, num_classes), pairs, PASSES)


if __name__ == "__main__":
    main()
