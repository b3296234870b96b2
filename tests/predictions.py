"""Models of random weights that predict in milliseconds, for the tests of prediction."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tailseg.checkpoint import save_model
from tailseg.data.annotations.annotations import Category
from tailseg.model.build import build_detector
from tailseg.recipes.resolve import resolve

SETTINGS = (
    "model.backbone={name: resnet10t, pretrained: false, frozen_stages: -1, options: {channels: [8, 16, 24, 32]}}",
    "model.neck.channels=16",
    "model.rpn={pre_nms_test: 50, post_nms_test: 20}",
    "model.box_head.width=32",
    "model.mask_head={channels: 8, convs: 1}",
    "data={test_short_edge: 64, long_edge: 96}",
    "test.max_detections=9",
)
CATEGORIES = (Category(5, "fork", "f", 9, 9), Category(7, "egg_cup", "r", 1, 1), Category(40, "owl", "c", 3, 3))


def save_random_model(path: Path) -> None:
    torch.manual_seed(0)
    recipe = resolve("demo/seesaw", SETTINGS)
    save_model(path, build_detector(recipe, len(CATEGORIES)), recipe, CATEGORIES, step=0)


def rectangles() -> NDArray[np.uint8]:
    """60 x 80 pixels of coloured rectangles."""
    pixels = np.full((60, 80, 3), 120, np.uint8)
    pixels[10:40, 20:50] = (250, 30, 20)
    pixels[30:55, 55:75] = (10, 40, 240)
    return pixels
