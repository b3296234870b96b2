"""Seesaw Loss in a one-stage detector: torchvision's RetinaNet with another classification head.

    pip install tailseg && python examples/torchvision_retinanet.py FOLDER

RetinaNet asks each anchor one yes-no question a class. Here all anchors are asked whether there is an object (sigmoid,
focal loss), and those on an object which class it is (softmax, Seesaw Loss). Labels are 0..C-1 here and there.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models.detection import RetinaNet, retinanet_resnet50_fpn
from torchvision.models.detection.retinanet import RetinaNetClassificationHead
from torchvision.ops import sigmoid_focal_loss

from tailseg import SeesawLoss, UserError
from tailseg.data.dataset import DetectionDataset
from tailseg.data.sources import open_splits
from tailseg.data.transforms import fit_transform

SIZES = {"min_size": 160, "max_size": 256}  # pixels of an image's short and long side: for a CPU
IMAGES, BATCH, PASSES = 8, 2, 6


class SeesawHead(RetinaNetClassificationHead):  # type: ignore[misc]  # torchvision has no types
    """torchvision's convolutions, for C class logits and one of objectness an anchor."""

    def __init__(self, in_channels: int, num_anchors: int, num_classes: int) -> None:
        super().__init__(in_channels, num_anchors, num_classes + 1)
        self.seesaw = SeesawLoss(num_classes, p=0.8, q=0.0)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Training: logits (B, anchors, C + 1). Inference: logits (B, anchors, C) whose sigmoids are the scores."""
        logits = super().forward(features)
        return logits if self.training else self.scores(logits).logit()  # torchvision applies a sigmoid to it

    def scores(self, logits: Tensor) -> Tensor:
        """Class probability times object probability, (..., C + 1) -> (..., C)."""
        return logits[..., :-1].float().softmax(dim=-1) * logits[..., -1:].float().sigmoid()

    def compute_loss(
        self, targets: list[dict[str, Tensor]], head_outputs: dict[str, Tensor], matched_idxs: list[Tensor]
    ) -> Tensor:
        """Focal loss of objectness over all anchors plus Seesaw Loss over those on an object, a mean over the latter.

        ``matched_idxs`` holds for each image and anchor the object, or -1 for background, or -2 for neither.
        """
        logits, matched = head_outputs["cls_logits"].float(), torch.stack(matched_idxs)
        positive, judged = matched >= 0, matched != self.BETWEEN_THRESHOLDS
        labels = torch.cat([target["labels"][own[own >= 0]] for target, own in zip(targets, matched, strict=True)])
        classes: Tensor = self.seesaw(logits[positive][:, :-1], labels)
        objectness: Tensor = sigmoid_focal_loss(logits[judged][:, -1], positive[judged].float(), reduction="sum")
        return classes + objectness / max(len(labels), 1)


def use_seesaw(model: RetinaNet, num_classes: int) -> RetinaNet:
    """Replace the classification head of torchvision's ``model``."""
    replaced = model.head.classification_head
    model.head.classification_head = SeesawHead(model.backbone.out_channels, replaced.num_anchors, num_classes)
    return model


def read(folder: Path, images: int) -> tuple[int, list[tuple[Tensor, dict[str, Tensor]]]]:
    """The number of classes, and the first training images (3, H, W) with torchvision's targets."""
    annotations = open_splits(folder, need=("train",)).train
    assert annotations is not None
    dataset = DetectionDataset(annotations, fit_transform(SIZES["min_size"], SIZES["max_size"]), drop_empty=True)
    samples = [dataset[index] for index in range(min(images, len(dataset)))]
    targets = [{"boxes": sample.instances.boxes, "labels": sample.instances.labels} for sample in samples]
    return len(annotations.categories), [(s.image / 255, target) for s, target in zip(samples, targets, strict=True)]


def train(model: RetinaNet, pairs: list[tuple[Tensor, dict[str, Tensor]]], passes: int) -> None:
    """Train with AdamW and print the mean of each loss in each pass over the images."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-5)
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
    parser = argparse.ArgumentParser(description="Train torchvision's RetinaNet with Seesaw Loss on a few images.")
    parser.add_argument("folder", type=Path, help="folder with train.json (LVIS or COCO format) and images/")
    try:
        num_classes, pairs = read(parser.parse_args(arguments).folder, IMAGES)
    except UserError as error:
        sys.exit(str(error))
    torch.manual_seed(0)
    model = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=num_classes, **SIZES)
    train(use_seesaw(model, num_classes), pairs, PASSES)


if __name__ == "__main__":
    main()
