"""A model that finds every disc of its classes' colours, whole or cut, and knows of nothing beside a picture."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

import tailseg
from tailseg.data.annotations.annotations import Category
from tailseg.model.detector import Wanted
from tailseg.recipes.resolve import resolve
from tailseg.structures import Batch, RawDetections

CATEGORIES = (Category(5, "fork", "f", 9, 9), Category(7, "egg_cup", "r", 1, 1), Category(40, "owl", "c", 3, 3))
COLOURS = np.array([(250, 30, 20), (10, 40, 240), (30, 200, 30)])  # of the classes
SIDE = 28  # of a mask's grid
SMALLEST = 6  # pixels of an object

Disc = tuple[int, int, int, int]  # x, y, radius, label


def example(name: str) -> ModuleType:
    """A file of the examples."""
    path = Path(__file__).parents[1] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"example_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn(height: int, width: int, discs: list[Disc]) -> NDArray[np.uint8]:
    """(height, width, 3) grey with discs."""
    picture = np.full((height, width, 3), 120, np.uint8)
    for x, y, radius, label in discs:
        cv2.circle(picture, (x, y), radius, COLOURS[label].tolist(), -1)
    return picture


class ColourDetector:
    """Stands for a `Detector`; a whole object scores 0.9, one that touches the edge of a picture 0.6."""

    device = torch.device("cpu")
    divisor, max_detections, nms_iou = 32, 300, 0.5

    def detect(self, batch: Batch, wanted: Wanted) -> list[RawDetections]:
        """What is seen in each picture, in pixels of its file."""
        sizes = zip(batch.images, batch.image_sizes.tolist(), batch.original_sizes.tolist(), strict=True)
        return [self._seen(image[:, :h, :w].permute(1, 2, 0).numpy(), hw, wanted) for image, (h, w), hw in sizes]

    def _seen(self, picture: NDArray[np.uint8], hw: list[int], wanted: Wanted) -> RawDetections:
        height, width = picture.shape[:2]
        boxes, scores, labels, masks = [], [], [], []
        for label, colour in enumerate(COLOURS):
            blobs = (abs(picture.astype(int) - colour) < 60).all(axis=2).astype(np.uint8)
            count, numbers, stats, _ = cv2.connectedComponentsWithStats(blobs)
            for number in range(1, count):
                x, y, w, h, area = stats[number].tolist()
                if area < SMALLEST:
                    continue
                whole = x > 0 and y > 0 and x + w < width and y + h < height
                boxes.append([x, y, x + w, y + h])
                scores.append(0.9 if whole else 0.6)
                labels.append(label)
                own = (numbers[y : y + h, x : x + w] == number).astype(np.float32)
                masks.append(cv2.resize(own, (SIDE, SIDE), interpolation=cv2.INTER_AREA))
        factors = torch.tensor([hw[1] / width, hw[0] / height] * 2)
        found = RawDetections(
            image_hw=(hw[0], hw[1]),
            boxes=torch.tensor(boxes, dtype=torch.float32).view(-1, 4) * factors,
            scores=torch.tensor(scores),
            labels=torch.tensor(labels, dtype=torch.int64),
            masks=torch.from_numpy(np.array(masks, np.float32).reshape(-1, SIDE, SIDE)),
        )
        order = found.scores.argsort(descending=True, stable=True)
        return found[order[found.scores[order] >= (wanted.min_score or 0)]]


def colour_model(side: int) -> tailseg.Model:
    """A model whose pictures, and slices of larger ones, are shown to it at ``side`` pixels."""
    recipe = resolve(
        "demo/seesaw", ("model.backbone.pretrained=false", f"data={{test_short_edge: {side}, long_edge: 2000}}")
    )
    return tailseg.Model(ColourDetector(), recipe, CATEGORIES)
